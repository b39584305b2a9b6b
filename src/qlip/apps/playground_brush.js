// A brush over a picture. `element`, `props` and `trigger` come from gradio, which runs this once for each component.
// When a stroke ends, its points, as shares of the picture, and its width go to Python as the event 'stroke'; which
// patches it touches is decided there. The orange line is gone as soon as the picture behind it is drawn again.

const board = () => element.querySelector(".board");
const canvas = () => element.querySelector("canvas");
const diameter = () => Number(element.querySelector("input").value) / Number(board().dataset.columns);
const leastStep = 0.004; // of the picture's width; closer points say nothing new
let points = null; // of the stroke that is being drawn

function place(event) {
  const box = board().getBoundingClientRect();
  return [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
}

function paint() {
  const { width, height } = canvas();
  const pen = canvas().getContext("2d");
  pen.clearRect(0, 0, width, height);
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
  canvas().width = canvas().clientWidth;
  canvas().height = canvas().clientHeight;
  canvas().setPointerCapture(event.pointerId);
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
  canvas().width = canvas().width; // clears it
});
