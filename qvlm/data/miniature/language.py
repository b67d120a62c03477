"""Language science: sentences, words and figures of speech; without images."""

from random import Random

from qvlm.data.miniature.skill import BOYS, GIRLS, NAMES, Draft, Skill, pick_others

SUBJECT = "language science"
ANIMALS = ("dog", "cat", "horse", "bird", "fox", "goat")
PLACES = ("barn", "park", "yard", "house", "field", "lake")


def sentence_kind(rng: Random) -> Draft:
    animal, place, person = rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(NAMES)
    sentences = {
        "declarative": (
            f"The {animal} sleeps in the {place}.",
            f"{person} walks to the {place}.",
        ),
        "interrogative": (
            f"Where is the {animal} of {person}?",
            f"Does the {animal} sleep in the {place}?",
        ),
        "imperative": (f"Feed the {animal} in the {place}.", f"Please wait at the {place}."),
        "exclamatory": (f"What a big {animal} {person} has!", f"How dark this {place} is!"),
    }
    right = rng.choice(sorted(sentences))
    does = {
        "declarative": "states a fact",
        "interrogative": "asks something",
        "imperative": "gives an order",
        "exclamatory": "shows strong feeling",
    }[right]
    sentence = rng.choice(sentences[right])
    wrong = rng.sample(sorted(set(sentences) - {right}), rng.randint(1, 3))
    question = f"What kind of sentence is this? {sentence}"
    return Draft(question, right, wrong, f"The sentence {does}, so it is")


RHYMES = (
    ("cat", "hat", "bat", "mat"),
    ("light", "night", "kite", "bite"),
    ("bear", "chair", "hair", "pear"),
    ("moon", "spoon", "noon", "tune"),
    ("cake", "lake", "snake", "rake"),
    ("ring", "king", "sing", "wing"),
    ("ball", "wall", "tall", "fall"),
    ("hop", "mop", "top", "shop"),
    ("bed", "red", "sled", "head"),
    ("goat", "boat", "coat", "note"),
)


def rhyme(rng: Random) -> Draft:
    groups = rng.sample(range(len(RHYMES)), 3)
    word, right = rng.sample(RHYMES[groups[0]], 2)
    wrong = [rng.choice(RHYMES[group]) for group in groups[1 : rng.randint(2, 3)]]
    return Draft(
        f"Which word rhymes with {word}?", right, wrong, f"A word that ends like {word} is"
    )


ORDERED = (
    *("apple", "boy", "cup", "door", "ear", "fan", "girl", "hill", "ice", "jam", "key", "lip"),
    *("man", "nut", "owl", "pan", "queen", "rug", "sun", "toy", "up", "van", "web", "yes", "zoo"),
)


def alphabet(rng: Random) -> Draft:
    words = rng.sample(ORDERED, rng.randint(2, 4))
    asked, best = rng.choice((("first", min), ("last", max)))
    right = best(words)
    words.remove(right)
    return Draft(
        f"Which word comes {asked} in alphabetical order?",
        right,
        words,
        f"The {asked} of the first letters is {right[0]}, so it is",
    )


VERBS = {
    "past": ("barked", "jumped", "walked", "played", "slept", "ran"),
    "present": ("barks", "jumps", "walks", "plays", "sleeps", "runs"),
    "future": ("will bark", "will jump", "will walk", "will play", "will sleep", "will run"),
}


def tense(rng: Random) -> Draft:
    right = rng.choice(sorted(VERBS))
    verb = rng.choice(VERBS[right])
    animal, place = rng.choice(ANIMALS), rng.choice(PLACES)
    where = rng.choice(("near", "in", "behind"))
    wrong = rng.sample(sorted(set(VERBS) - {right}), rng.randint(1, 2))
    question = f"Which tense is this? The {animal} {verb} {where} the {place}."
    return Draft(question, right, wrong, f"The tense of {verb} is")


SAME = (
    *(("big", "large"), ("small", "little"), ("fast", "quick"), ("happy", "glad")),
    *(("angry", "mad"), ("smart", "clever"), ("begin", "start"), ("end", "finish")),
    *(("ill", "sick"), ("rich", "wealthy"), ("brave", "bold"), ("shut", "close")),
)
OPPOSITE = (
    *(("hot", "cold"), ("up", "down"), ("wet", "dry"), ("hard", "soft")),
    *(("early", "late"), ("full", "empty"), ("young", "old"), ("strong", "weak")),
    *(("loud", "quiet"), ("deep", "shallow"), ("buy", "sell"), ("win", "lose")),
)


def synonyms(rng: Random) -> Draft:
    pairs, relation = rng.choice(((SAME, "means the same as"), (OPPOSITE, "is the opposite of")))
    word, right = rng.sample(rng.choice(pairs), 2)
    others = [w for pair in (*SAME, *OPPOSITE) if word not in pair for w in pair]
    wrong = pick_others(rng, others, right, rng.randint(1, 3))
    return Draft(
        f"Which word {relation} {word}?", right, wrong, f"The word that {relation} {word} is"
    )


def run_on(rng: Random) -> Draft:
    first, second = rng.sample(ANIMALS, 2)
    did, done = rng.sample(VERBS["past"], 2)
    place = rng.choice(PLACES)
    kind = rng.choice(("complete sentence", "run-on sentence", "sentence fragment"))
    hint, reason = {
        "complete sentence": (
            f"The {first} {did} and the {second} {done}.",
            "It joins its parts with and, so it is a",
        ),
        "run-on sentence": (
            f"The {first} {did} the {second} {done}.",
            "It joins two sentences with nothing, so it is a",
        ),
        "sentence fragment": (
            f"The {first} and the {second} in the {place}.",
            "It has no verb, so it is a",
        ),
    }[kind]
    wrong = {"complete sentence", "run-on sentence", "sentence fragment"} - {kind}
    return Draft("What is this group of words?", kind, sorted(wrong), reason, hint=hint)


def figure(rng: Random) -> Draft:
    person, animal, place = rng.choice(NAMES), rng.choice(ANIMALS), rng.choice(PLACES)
    quality = rng.choice(("brave", "fast", "quiet", "strong", "clever"))
    kinds = {
        "simile": (f"{person} is as {quality} as a {animal}.", "compares two things with as"),
        "metaphor": (f"{person} is a {quality} {animal}.", "says one thing is another"),
        "personification": (
            f"The {quality} {place} whispered to {person}.",
            "lets a place act as a person",
        ),
        "hyperbole": (
            f"{person} saw a million {animal}s in the {place}.",
            "exaggerates a number",
        ),
    }
    right = rng.choice(sorted(kinds))
    hint, does = kinds[right]
    wrong = rng.sample(sorted(set(kinds) - {right}), rng.randint(1, 3))
    question = "Which figure of speech is used?"
    return Draft(question, right, wrong, f"The text {does}, which is", hint=hint)


def pronoun(rng: Random) -> Draft:
    girl, boy = rng.choice(GIRLS), rng.choice(BOYS)
    first, second = rng.sample((girl, boy), 2)
    word = rng.choice(("she", "he"))
    right, wrong = (girl, boy) if word == "she" else (boy, girl)
    thing = rng.choice(("pencil", "book", "coat", "lamp", "shirt"))
    kind = "girl" if word == "she" else "boy"
    return Draft(
        f"To whom does the word {word} refer?",
        right,
        [wrong],
        f"The word {word} refers to the {kind}, who is",
        hint=f"{first} gave {second} a {thing} because {word} was kind.",
    )


def _skill(
    name: str, topic: str, weight: float, grades: tuple[int, int], lecture: str, make: object
) -> Skill:
    return Skill(name, SUBJECT, topic, name, weight, grades, lecture, make)  # type: ignore[arg-type]


SKILLS = (
    _skill("Identify kinds of sentences", "grammar", 3, (2, 9), "", sentence_kind),
    _skill("Find rhyming words", "phonics", 3, (1, 2), "Rhymes end alike.", rhyme),
    _skill("Put words in alphabetical order", "reference skills", 4, (1, 5), "", alphabet),
    _skill("Identify verb tense", "grammar", 3, (2, 6), "", tense),
    _skill("Synonyms and antonyms", "vocabulary", 4, (2, 8), "", synonyms),
    _skill("Run-on sentences and fragments", "writing", 3, (6, 12), "", run_on),
    _skill("Figures of speech", "figurative language", 3, (7, 12), "", figure),
    _skill("Pronoun reference", "grammar", 3, (6, 12), "", pronoun),
)
