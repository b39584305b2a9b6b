// A brush over a picture. `element`, `props` and `trigger` come from gradio, which runs this once for each component.
// When a stroke ends, its points, as shares of the picture, and its width go to Python as the event 'stroke'; which
// patches it touches is decided there. Python's answer, whatever it is, comes back as the event 'answered'.

const board = () => element.querySelector(".board");
const canvas = () => element.querySelector("canvas");
const diameter = () => Number(element.querySelector("input").value) / Number(board().dataset.columns);
const leastStep = 0.004; // of the picture's width; closer points say nothing new
let points = null; // of the stroke that is being drawn

function clear() {
  canvas().width = canvas().clientWidth; // setting them clears it
  canvas().height = canvas().clientHeight;
}

function place(event) {
  const box = board().getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function paint() {
  clear(); // the canvas is a new one when the picture has been drawn again meanwhile
  const { width, height } = canvas();
  const pen = canvas().getContext("2d");
  pen.lineWidth = diameter() * width;
  pen.lineCap = pen.lineJoin = "round";
  pen.strokeStyle = "rgb(249, 115, 22)";
  pen.beginPath();
  pen.moveTo(points[0][0] * width, points[0][1] * height);
  for (const [x, y] of points) pen.lineTo(x * width, y * height);
  pen.stroke();
}

element.addEventListener("pointerdown", (event) => {
  if (event.button !== 0 || !event.target.closest(".board")) return;
  event.preventDefault();
  element.setPointerCapture(event.pointerId); // not the canvas, which may be replaced before the stroke ends
  points = [place(event)];
  paint();
});

element.addEventListener("pointermove", (event) => {
  if (points === null) return;
  const [x, y] = place(event);
  const [lastX, lastY] = points[points.length - 1];
  if (Math.hypot(x - lastX, y - lastY) < leastStep) return;
  points.push([x, y]);
  paint();
});

element.addEventListener("pointerup", () => {
  if (points === null) return;
  trigger("stroke", { points, diameter: diameter() });
  points = null;
});

element.addEventListener("pointercancel", () => {
  points = null;
  clear();
});

element.addEventListener("answered", () => {
  if (points === null) clear();
});
