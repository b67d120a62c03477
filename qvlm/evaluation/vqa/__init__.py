"""The tasks VQAv2 and VizWiz of the paper's Table 3, which lm-eval does not ship.

`questions.py` reads the data, which a user has to have, and scores answers. The YAML files beside
it are the tasks.
"""

NAMES = {"vqav2": "VQAv2", "vizwiz": "VizWiz"}
