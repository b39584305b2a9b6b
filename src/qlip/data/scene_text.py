"""What can be said of a scene: captions short to dense, questions with answers, and a story without picture.

Input is a record of `qlip.data.scenes.scene_records`; every text is true of the scene (tested), and every choice is
drawn from the random source given, so a shard's texts are reproducible.
"""

from __future__ import annotations

from random import Random

NUMBER_WORDS = ("no", "one", "two", "three", "four")


def plural(shape: str) -> str:
    """`cross` -> `crosses`, `star` -> `stars`."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(phrase: str) -> str:
    """`orange star` -> `an orange star`."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def place(obj: dict) -> str:
    """Coarse position of an object in words: `top left`, `center`, `right`, ..."""
    row = "top" if obj["y"] < 0.38 else "bottom" if obj["y"] > 0.62 else ""
    column = "left" if obj["x"] < 0.38 else "right" if obj["x"] > 0.62 else ""
    return f"{row} {column}".strip() or "center"


def relation(a: dict, b: dict) -> str:
    """How a lies to b along the larger offset: `left of`, `right of`, `above` or `below`."""
    dx, dy = a["x"] - b["x"], a["y"] - b["y"]
    if abs(dx) >= abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _name(obj: dict) -> str:
    return f"{obj['colour']} {obj['shape']}"


def _listing(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def shape_caption(record: dict, random: Random) -> str:
    """The shapes alone, in order: `a star`, `a picture of a ring and a cross`."""
    shapes = _listing([with_article(obj["shape"]) for obj in record["objects"]])
    return random.choice([shapes, shapes, f"a picture of {shapes}"])


def short_caption(record: dict, random: Random) -> str:
    """Alt-text: often the shape alone, sometimes the colour alone, sometimes both; several objects are listed."""
    objects = record["objects"]
    kind = random.random()
    if len(objects) == 1:
        obj = objects[0]
        if kind < 0.6:
            return random.choice(
                [obj["shape"], with_article(obj["shape"]), f"a picture of {with_article(obj['shape'])}"]
            )
        if kind < 0.75:
            return random.choice([f"something {obj['colour']}", f"{with_article(obj['colour'])} shape"])
        return random.choice([_name(obj), with_article(_name(obj))])
    if len({obj["shape"] for obj in objects}) == 1:
        return f"{NUMBER_WORDS[len(objects)]} {plural(objects[0]['shape'])}"
    if kind < 0.6:
        return _listing([with_article(obj["shape"]) for obj in objects])
    return _listing([with_article(_name(obj)) for obj in objects])


def medium_caption(record: dict, random: Random) -> str:
    """One sentence: each object with its colour and either its place, its size or its neighbour."""
    objects = record["objects"]
    first = objects[0]
    if len(objects) == 1:
        phrase = with_article(f"{first['size']} {_name(first)}")
        ending = random.choice([f"on {with_article(record['background'])} background", f"at the {place(first)}"])
        return f"{phrase} {ending}"
    if len(objects) == 2:
        return f"{with_article(_name(first))} {relation(first, objects[1])} {with_article(_name(objects[1]))}"
    return f"{NUMBER_WORDS[len(objects)]} shapes: {_listing([_name(obj) for obj in objects])}"


def dense_caption(record: dict) -> str:
    """Everything there is: count, each object with size, colour and place, background and texture."""
    objects = record["objects"]
    count = f"{NUMBER_WORDS[len(objects)]} {'shape' if len(objects) == 1 else 'shapes'}"
    things = _listing([f"{with_article(obj['size'] + ' ' + _name(obj))} at the {place(obj)}" for obj in objects])
    return f"{count} on {with_article(record['texture'] + ' ' + record['background'])} background: {things}"


def question_answers(record: dict, random: Random, *, colours: tuple[str, ...], shapes: tuple[str, ...]) -> list[dict]:
    """Questions of four kinds (existence, colour, count, position), each with its one right answer."""
    objects = record["objects"]
    obj = random.choice(objects)
    present = {_name(o) for o in objects}
    absent = random.choice([f"{c} {s}" for c in colours for s in shapes if f"{c} {s}" not in present])
    asked = _name(obj) if random.random() < 0.5 else absent
    questions = [
        {
            "kind": "existence",
            "question": f"Is there {with_article(asked)}?",
            "answer": "yes" if asked in present else "no",
        },
        {"kind": "count", "question": "How many shapes are there?", "answer": NUMBER_WORDS[len(objects)]},
    ]
    if sum(o["shape"] == obj["shape"] for o in objects) == 1:
        questions.append({"kind": "colour", "question": f"What color is the {obj['shape']}?", "answer": obj["colour"]})
    if len(objects) == 1:
        questions.append({"kind": "position", "question": f"Where is the {obj['shape']}?", "answer": place(obj)})
    elif _name(objects[0]) != _name(objects[1]) and len(present) == len(objects):
        a, b = _name(objects[0]), _name(objects[1])
        position = relation(objects[0], objects[1])
        questions.append({"kind": "position", "question": f"Where is the {a} seen from the {b}?", "answer": position})
    return questions


def story(record: dict, random: Random) -> str:
    """A few sentences that make sense without the picture: text for language modelling."""
    objects = record["objects"]
    hero = objects[0]
    opening = random.choice(["Once upon a time", "One morning", "Long ago", "On a quiet day"])
    home = f"in {with_article(record['background'])} land"
    sentences = [f"{opening} there was {with_article(hero['size'] + ' ' + _name(hero))} {home}."]
    for friend in objects[1:]:
        verb = random.choice(["met", "found", "greeted", "followed"])
        sentences.append(f"The {hero['shape']} {verb} {with_article(_name(friend))}.")
    if len(objects) == 1:
        sentences.append(f"The {hero['shape']} was alone and looked at the {record['texture']} ground.")
    else:
        sentences.append(f"Now there were {NUMBER_WORDS[len(objects)]} of them.")
    sentences.append(f"And the {hero['shape']} stayed {hero['colour']} for ever.")
    return " ".join(sentences)
