"""Natural science: problems with image and hint, with one of them, and with neither."""

from random import Random

from qvlm.data.miniature.draw import COLORS, Canvas
from qvlm.data.miniature.skill import NAMES, Draft, Skill, pick_others

SUBJECT = "natural science"


def magnets(rng: Random) -> Draft:
    canvas = Canvas(rng)
    facing = [rng.choice(("red", "blue")) for _ in range(2)]
    far = ["blue" if color == "red" else "red" for color in facing]
    lying = rng.random() < 0.5
    for i, color in enumerate((far[0], facing[0], facing[1], far[1])):
        begin = (2, 12, 26, 36)[i]
        box = (begin, 16, begin + 10, 32) if lying else (16, begin, 32, begin + 10)
        canvas.box(box, color)
    alike = facing[0] == facing[1]
    right, wrong = ("repel", "attract") if alike else ("attract", "repel")
    seen = f"both {facing[0]}" if alike else "red and blue"
    person = rng.choice(NAMES)
    return Draft(
        "Will these magnets attract or repel each other?",
        right,
        [wrong],
        f"The poles that face each other are {seen}, so they",
        hint=f"{person} puts two magnets on a table. North poles are red, south poles are blue.",
        image=canvas.finish(),
    )


def concentration(rng: Random) -> Draft:
    canvas = Canvas(rng)
    color = rng.choice(("red", "blue", "green", "purple", "orange"))
    levels = [rng.choice(("few", "many")) for _ in range(2)]
    for side, level in enumerate(levels):
        left = 2 + 24 * side
        canvas.box((left, 4, left + 20, 46), "black")
        canvas.box((left + 2, 4, left + 18, 44), "yellow")
        cells = [(left + 4 + 7 * i, 8 + 9 * j) for i in range(2) for j in range(4)]
        for x, y in rng.sample(cells, rng.randint(1, 2) if level == "few" else 7):
            canvas.box((x, y, x + 5, y + 6), color)
    options = ["left beaker", "right beaker", "neither beaker"]
    best = 2 if levels[0] == levels[1] else levels.index("many")
    right = options.pop(best)
    solute = rng.choice(("salt", "sugar", "soda", "acid"))
    return Draft(
        "Which solution has a higher concentration?",
        right,
        options,
        f"The left holds {levels[0]} particles and the right holds {levels[1]}, so",
        hint=f"Both beakers hold the same volume. Each {color} square is a particle of {solute}.",
        image=canvas.finish(),
    )


def thermometers(rng: Random) -> Draft:
    canvas = Canvas(rng)
    names = ("low", "middle", "high")
    levels = [rng.randrange(3) for _ in range(2)]
    for side, level in enumerate(levels):
        x = 13 + 24 * side
        canvas.box((x - 5, 2, x + 5, 46), "black")
        canvas.box((x - 3, 4, x + 3, 44), "yellow")
        canvas.box((x - 3, (36, 22, 6)[level], x + 3, 44), "red")
    options = ["left sample", "right sample", "neither sample"]
    best = 2 if levels[0] == levels[1] else int(levels[1] > levels[0])
    right = options.pop(best)
    gas = rng.choice(("helium", "argon", "neon", "oxygen"))
    return Draft(
        "Which sample has the higher kinetic energy?",
        right,
        options,
        f"The left level is {names[levels[0]]} and the right level is {names[levels[1]]}, so",
        hint=f"{rng.choice(NAMES)} heats two samples of {gas} with the same mass.",
        image=canvas.finish(),
    )


def particles(rng: Random) -> Draft:
    canvas = Canvas(rng)
    state = rng.choice(("solid", "liquid", "gas"))
    color = rng.choice(("red", "blue", "green", "purple", "black"))
    if state == "solid":
        spots = [(10 + 9 * i, 10 + 9 * j) for i in range(4) for j in range(4)]
    elif state == "liquid":
        spots = [
            (6 + 7 * i + rng.randint(-2, 2), y + rng.randint(-2, 2))
            for i in range(6)
            for y in (29, 36, 43)
        ]
    else:
        cells = [(8 + 11 * i, 8 + 11 * j) for i in range(4) for j in range(4)]
        spots = [(x + rng.randint(-2, 2), y + rng.randint(-2, 2)) for x, y in rng.sample(cells, 5)]
    for x, y in spots:
        canvas.disc(x, y, 3, color)
    options = ["solid", "liquid", "gas"]
    options.remove(state)
    seen = {
        "solid": "packed in rows",
        "liquid": "close together at the bottom",
        "gas": "far apart",
    }[state]
    substance = rng.choice(("water", "iron", "wax", "alcohol", "mercury", "oxygen"))
    return Draft(
        f"What is the state of the {substance}?",
        state,
        options,
        f"The particles are {seen}, as in a",
        hint=f"The model shows {color} particles of {substance} in a closed box.",
        image=canvas.finish(),
    )


def force(rng: Random) -> Draft:
    canvas = Canvas(rng)
    direction = rng.choice(("left", "right", "up", "down"))
    canvas.arrow(direction, rng.choice(("red", "blue", "green", "black", "purple")))
    options = ["left", "right", "up", "down"]
    options.remove(direction)
    side = {"left": "left", "right": "right", "up": "top", "down": "bottom"}[direction]
    thing = rng.choice(("box", "cart", "sled", "ball", "door", "crate"))
    person = rng.choice(NAMES)
    return Draft(
        f"In which direction does the {thing} speed up?",
        direction,
        options,
        f"The arrow points to the {side}, so the {thing} speeds up",
        hint=f"{person} moves a {thing}. The arrow shows the net force on it.",
        image=canvas.finish(),
    )


def food_web(rng: Random) -> Draft:
    canvas = Canvas(rng)
    first, second = rng.sample(sorted(set(COLORS) - {"black", "brown"}), 2)
    direction = rng.choice(("left", "right"))
    canvas.box((1, 4, 17, 20), first)
    canvas.box((31, 4, 47, 20), second)
    canvas.arrow(direction, "black", (24, 34))
    eater, eaten = (first, second) if direction == "left" else (second, first)
    asked = rng.choice(("eats", "is eaten by"))
    right, wrong = (eater, eaten) if asked == "eats" else (eaten, eater)
    side = "left" if right == first else "right"
    return Draft(
        f"The arrow points to the eater. Which animal {asked} the other?",
        right,
        [wrong],
        f"The arrow points {direction}, so the answer is the {side} animal, which is",
        image=canvas.finish(),
    )


def beak(rng: Random) -> Draft:
    canvas = Canvas(rng)
    color = rng.choice(("red", "blue", "green", "brown", "purple"))
    canvas.disc(13, 24, 11, color)
    shape = rng.choice(("long and thin", "short and thick", "wide and flat"))
    points = {
        "long and thin": (22, 22, 47, 24, 22, 27),
        "short and thick": (20, 12, 33, 24, 20, 36),
        "wide and flat": (22, 26, 46, 26, 46, 38, 22, 32),
    }[shape]
    canvas.polygon(points, "orange")
    foods = {
        "long and thin": "nectar from flowers",
        "short and thick": "hard seeds",
        "wide and flat": "plants in water",
    }
    right = foods.pop(shape)
    return Draft(
        "What is this beak adapted to eat?",
        right,
        list(foods.values()),
        f"The beak is {shape}, which suits",
        image=canvas.finish(),
    )


INHERITED = (
    *("brown hair", "blue eyes", "long fingers", "dark skin", "curly lashes", "green eyes"),
    *("straight hair", "large ears", "small feet", "dimpled cheeks"),
)
ACQUIRED = (
    *("playing chess", "speaking French", "riding bikes", "baking bread", "reading maps"),
    *("painting walls", "writing poems", "fixing clocks", "singing songs", "knitting scarves"),
)


def inherited(rng: Random) -> Draft:
    person = rng.choice(NAMES)
    born, learned = rng.choice(INHERITED), rng.choice(ACQUIRED)
    facts = [f"{person} was born with {born}.", f"{person} learned {learned} at school."]
    rng.shuffle(facts)
    if rng.random() < 0.5:
        question, right, wrong = f"Which trait did {person} inherit?", born, learned
        reason = f"{person} was born with it, so the inherited trait is"
    else:
        question, right, wrong = f"Which trait did {person} acquire?", learned, born
        reason = f"{person} learned it, so the acquired trait is"
    return Draft(question, right, [wrong], reason, hint=" ".join(facts))


ALLELES = {
    "T": ("tall stems", "short stems", "pea"),
    "R": ("red petals", "white petals", "rose"),
    "S": ("smooth seeds", "wrinkled seeds", "bean"),
    "G": ("green pods", "yellow pods", "pea"),
    "H": ("hairy leaves", "bare leaves", "tomato"),
    "F": ("full blooms", "single blooms", "rose"),
}


def dominance(rng: Random) -> Draft:
    letter = rng.choice(sorted(ALLELES))
    dominant, recessive, plant = ALLELES[letter]
    low = letter.lower()
    kind = rng.choice((letter + letter, letter + low, low + low, low + low))
    person = rng.choice(NAMES)
    has = letter in kind
    right, wrong = (dominant, recessive) if has else (recessive, dominant)
    count = "a" if has else "no"
    return Draft(
        f"What does a {plant} plant with {kind} have?",
        right,
        [wrong],
        f"The plant has {count} dominant allele, so it has",
        hint=f"{person} grows plants. Allele {letter} for {dominant} is dominant over {low}.",
    )


GASES = ("helium", "argon", "neon", "oxygen", "nitrogen", "xenon")


def kinetic(rng: Random) -> Draft:
    first, second = rng.sample(GASES, 2)
    low, high = rng.sample(range(1, 10), 2)
    hot, cold = (first, second) if low > high else (second, first)
    asked = rng.choice(("faster", "slower"))
    right, wrong = (hot, cold) if asked == "faster" else (cold, hot)
    compared = "higher" if asked == "faster" else "lower"
    degrees = max(low, high) if asked == "faster" else min(low, high)
    return Draft(
        f"Which gas has the {asked} particles?",
        right,
        [wrong],
        f"The {compared} temperature is {degrees}0, so it is the",
        hint=f"The {first} is at {low}0 degrees and the {second} is at {high}0 degrees.",
    )


GROUPS = {
    "mammals": ("dog", "horse", "whale", "bat", "lion", "mouse"),
    "birds": ("eagle", "duck", "owl", "robin", "parrot", "goose"),
    "fish": ("shark", "salmon", "trout", "eel", "cod", "tuna"),
    "reptiles": ("snake", "lizard", "turtle", "crocodile", "gecko", "iguana"),
    "amphibians": ("frog", "toad", "newt", "salamander"),
}


def vertebrates(rng: Random) -> Draft:
    group = rng.choice(sorted(GROUPS))
    animal = rng.choice(GROUPS[group])
    question = rng.choice(
        ("To which group does the {} belong?", "A scientist sees one {}. What is its group?")
    ).format(animal)
    wrong = pick_others(rng, sorted(GROUPS), group, rng.randint(2, 4))
    return Draft(question, group, wrong, f"The {animal} belongs to the")


CHANGES = {
    "physical change": (
        *("ice melting", "water boiling", "glass breaking", "paper tearing", "sugar dissolving"),
        *("wax melting", "wood splitting", "clay bending"),
    ),
    "chemical change": (
        *("wood burning", "iron rusting", "milk souring", "bread baking", "fruit rotting"),
        *("paper burning", "silver tarnishing", "eggs cooking"),
    ),
}


def change(rng: Random) -> Draft:
    right, wrong = rng.sample(sorted(CHANGES), 2)
    event = rng.choice(CHANGES[right])
    person = rng.choice(NAMES)
    matter = "no new matter forms" if right.startswith("physical") else "new matter forms"
    return Draft(
        f"{person} sees {event}. What kind of change is it?",
        right,
        [wrong],
        f"In {event} {matter}, so it is a",
    )


THINGS = {
    "solid": ("rock", "brick", "coin", "spoon", "desk", "chalk", "nail", "shell"),
    "liquid": ("milk", "juice", "rain", "vinegar", "honey", "oil", "tea", "ink"),
    "gas": ("air", "steam", "helium", "oxygen", "neon", "methane", "argon", "nitrogen"),
}


def matter(rng: Random) -> Draft:
    state = rng.choice(sorted(THINGS))
    right = rng.choice(THINGS[state])
    others = [thing for kind in sorted(THINGS) if kind != state for thing in THINGS[kind]]
    wrong = rng.sample(others, rng.randint(1, 3))
    return Draft(f"Which of these is a {state}?", right, wrong, f"The only {state} here is")


UNITS = {
    "millimeters": ("ant", "seed", "grain", "flea", "crumb", "bead"),
    "centimeters": ("pencil", "hand", "fork", "shoe", "book", "carrot"),
    "meters": ("bus", "room", "tree", "pool", "fence", "bridge"),
    "kilometers": ("river", "highway", "coast", "border", "trail", "canyon"),
}


def units(rng: Random) -> Draft:
    unit = rng.choice(sorted(UNITS))
    thing = rng.choice(UNITS[unit])
    person = rng.choice(NAMES)
    question = f"{person} measures the length of a {thing}. Which unit is best?"
    wrong = pick_others(rng, sorted(UNITS), unit, rng.randint(1, 3))
    return Draft(question, right=unit, wrong=wrong, reason=f"The length of a {thing} is best in")


def _skill(
    name: str, topic: str, weight: float, grades: tuple[int, int], lecture: str, make: object
) -> Skill:
    return Skill(name, SUBJECT, topic, name, weight, grades, lecture, make)  # type: ignore[arg-type]


SKILLS = (
    _skill("Predict magnet forces", "physics", 5, (3, 8), "Opposite poles attract.", magnets),
    _skill("Compare concentrations", "chemistry", 5, (6, 9), "", concentration),
    _skill(
        "Compare kinetic energies", "physics", 5, (6, 9), "Hot particles move fast.", thermometers
    ),
    _skill("Identify states from particles", "chemistry", 5, (4, 8), "", particles),
    _skill("Relate force and motion", "physics", 5, (2, 6), "A force changes motion.", force),
    _skill("Interpret food webs", "biology", 3, (3, 8), "", food_web),
    _skill("Adaptations of beaks", "biology", 3, (2, 6), "Beaks fit their food.", beak),
    _skill("Inherited and acquired traits", "biology", 4, (3, 8), "", inherited),
    _skill("Dominant and recessive alleles", "biology", 3, (6, 8), "One is enough.", dominance),
    _skill("Temperature and particle speed", "physics", 3, (5, 8), "", kinetic),
    _skill("Classify vertebrates", "biology", 3, (2, 6), "", vertebrates),
    _skill("Physical and chemical change", "chemistry", 3, (2, 7), "", change),
    _skill("Classify matter", "chemistry", 3, (1, 4), "", matter),
    _skill("Choose units of length", "physics", 3, (1, 5), "", units),
)
