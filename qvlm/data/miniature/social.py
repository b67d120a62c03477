"""Social science: schematic maps and charts, and a few facts without images."""

from random import Random

from qvlm.data.miniature.draw import Canvas
from qvlm.data.miniature.skill import NAMES, Draft, Skill, pick_others

SUBJECT = "social science"
LAND = (196, 214, 180)
MARKERS = ("red", "blue", "yellow", "purple", "orange", "black")


def map_direction(rng: Random) -> Draft:
    canvas = Canvas(rng, LAND)
    spots = {"north": (20, 2), "south": (20, 37), "west": (2, 20), "east": (37, 20)}
    sides = {"north": "top", "south": "bottom", "west": "left", "east": "right"}
    colors = dict(zip(spots, rng.sample(MARKERS, 4), strict=True))
    for place, (x, y) in spots.items():
        canvas.box((x, y, x + 9, y + 9), colors[place])
    asked = rng.choice(sorted(spots))
    right = colors.pop(asked)
    wrong = rng.sample(sorted(colors.values()), rng.randint(2, 3))
    return Draft(
        f"Which marker on this map is farthest {asked}?",
        right,
        wrong,
        f"On a map {asked} is at the {sides[asked]}, and the {sides[asked]} marker is",
        image=canvas.finish(),
    )


REGIONS = {
    "Alba": "top left",
    "Brent": "top middle",
    "Corva": "top right",
    "Delmar": "middle left",
    "Elden": "middle",
    "Fara": "middle right",
    "Galen": "bottom left",
    "Hesper": "bottom middle",
    "Ister": "bottom right",
}


def region(rng: Random) -> Draft:
    canvas = Canvas(rng, (150, 190, 225))
    right = rng.choice(sorted(REGIONS))
    bright = rng.choice(("red", "orange", "purple"))
    for index, name in enumerate(REGIONS):
        x, y = 2 + 15 * (index % 3), 2 + 15 * (index // 3)
        canvas.box((x, y, x + 14, y + 14), bright if name == right else "green")
    question = rng.choice(
        ("What is the name of the highlighted region?", "Which region of this map is highlighted?")
    )
    wrong = pick_others(rng, sorted(REGIONS), right, 3)
    reason = f"The {bright} region at the {REGIONS[right]} is"
    return Draft(question, right, wrong, reason, image=canvas.finish())


def bars(rng: Random) -> Draft:
    canvas = Canvas(rng)
    count = rng.randint(2, 3)
    heights = rng.sample((10, 25, 42), count)
    colors = rng.sample(MARKERS, count)
    for index, (height, color) in enumerate(zip(heights, colors, strict=True)):
        x = 3 + 15 * index
        canvas.box((x, 46 - height, x + 12, 46), color)
    asked, best = rng.choice((("tallest", max), ("shortest", min)))
    right = colors.pop(heights.index(best(heights)))
    return Draft(
        f"Which color of bar is the {asked} in the chart?",
        right,
        colors,
        f"The {asked} bar in the chart is",
        image=canvas.finish(),
    )


def compass(rng: Random) -> Draft:
    canvas = Canvas(rng, (235, 225, 200))
    sides = {"north": "top", "south": "bottom", "west": "left", "east": "right"}
    turns = {"north": "up", "south": "down", "west": "left", "east": "right"}
    right = rng.choice(sorted(sides))
    canvas.arrow(turns[right], rng.choice(("red", "blue", "black", "brown")))
    wrong = rng.sample(sorted(set(sides) - {right}), rng.randint(2, 3))
    return Draft(
        "The top of this map is north. Where does the road lead?",
        right,
        wrong,
        f"The arrow points to the {sides[right]}, which is",
        image=canvas.finish(),
    )


CROPS = ("wheat", "corn", "rice", "cotton", "grapes", "potatoes")


def legend(rng: Random) -> Draft:
    first, second = rng.sample(("red", "blue", "yellow", "purple", "orange"), 2)
    color = rng.choice((first, second))
    canvas = Canvas(rng, LAND)
    canvas.polygon((6, 14, 22, 4, 42, 10, 44, 34, 28, 44, 8, 36), color)
    crops = rng.sample(CROPS, 4)
    right = crops[0] if color == first else crops[1]
    wrong = [crop for crop in crops[: rng.randint(3, 4)] if crop != right]
    return Draft(
        "What does the land on this map grow?",
        right,
        wrong,
        f"The land is {color}, and {color} land grows",
        hint=f"On this map {first} land grows {crops[0]} and {second} land grows {crops[1]}.",
        image=canvas.finish(),
    )


CAPITALS = {
    "Ohio": "Columbus",
    "Texas": "Austin",
    "Georgia": "Atlanta",
    "Utah": "Salt Lake City",
    "Maine": "Augusta",
    "Oregon": "Salem",
    "Iowa": "Des Moines",
    "Idaho": "Boise",
    "Nevada": "Carson City",
    "Alaska": "Juneau",
    "Hawaii": "Honolulu",
    "Kansas": "Topeka",
    "Colorado": "Denver",
    "Arizona": "Phoenix",
    "Florida": "Tallahassee",
    "Virginia": "Richmond",
    "Indiana": "Indianapolis",
    "Illinois": "Springfield",
    "Montana": "Helena",
    "Vermont": "Montpelier",
}


def capitals(rng: Random) -> Draft:
    state = rng.choice(sorted(CAPITALS))
    right = CAPITALS[state]
    wrong = pick_others(rng, sorted(CAPITALS.values()), right, 3)
    return Draft(f"What is the capital of {state}?", right, wrong, f"The capital of {state} is")


TRADE = {
    "good": ("shirt", "lamp", "book", "apple", "chair", "phone", "coat", "pencil", "bike", "table"),
    "service": (
        *("haircut", "lesson", "massage", "checkup", "repair", "cleaning", "delivery", "tour"),
        *("concert", "ride"),
    ),
}


def goods(rng: Random) -> Draft:
    right, wrong = rng.sample(sorted(TRADE), 2)
    thing = rng.choice(TRADE[right])
    question = f"{rng.choice(NAMES)} pays for one {thing}. Is it a good or a service?"
    what = "can be touched" if right == "good" else "is work done by others"
    return Draft(question, right, [wrong], f"One {thing} {what}, so it is a")


def _skill(name: str, topic: str, weight: float, grades: tuple[int, int], make: object) -> Skill:
    return Skill(name, SUBJECT, topic, name, weight, grades, "", make)  # type: ignore[arg-type]


SKILLS = (
    _skill("Read a map: cardinal directions", "geography", 4, (2, 7), map_direction),
    _skill("Identify regions on a map", "geography", 3, (3, 9), region),
    _skill("Read a bar chart", "economics", 3, (2, 6), bars),
    _skill("Follow a road on a map", "geography", 3, (2, 5), compass),
    _skill("Use a map legend", "geography", 4, (3, 8), legend),
    _skill("Name state capitals", "geography", 2, (3, 8), capitals),
    _skill("Goods and services", "economics", 2, (1, 5), goods),
)
