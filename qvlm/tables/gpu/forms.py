"""What is measured: packed forms, prompts, and the sizes of a run."""

from dataclasses import dataclass

from qvlm.data.sizes import PUBLISHED_QUESTIONS
from qvlm.quantization import QuantizationConfig, QuantSpec

# ScienceQA's test split: its questions, the share of them with an image, and mean tokens of text
# and of the published answers of the paper's checkpoint.
QUESTIONS, WITH_IMAGE = PUBLISHED_QUESTIONS, 0.48
TEXT, ANSWER = 60, 205
LONG, SHORT = 600, 64  # prompt and answer that table4_scale measures, for comparison
PAPER_SEARCH_HOURS = 24.6  # of LLaVA-7B at W4A4, Table 1


@dataclass(frozen=True)
class Form:
    """A packed form of a model.

    Attributes:
        name: Name on the page.
        bits: Number of bits of weights and of activations.
        language: Granularity of the language model's activations.
        normal_float: Whether weights are NormalFloat as in QLoRA.
    """

    name: str
    bits: int
    language: str
    normal_float: bool = False

    def quantization(self, group: int) -> QuantizationConfig:
        """Returns how tensors are quantized, with groups and clusters of `group` channels."""
        return QuantizationConfig(
            weight=QuantSpec(self.bits, "per_group", group, ranges="minmax"),
            language=QuantSpec(self.bits, self.language, group, ranges="minmax"),
            vision=QuantSpec(self.bits, "per_token", ranges="minmax"),
        )


BF16 = "bf16"
W4A4 = Form("W4A4 clusters", 4, "per_channel_group")
W8A8 = Form("W8A8 clusters", 8, "per_channel_group")
NF4A4 = Form("NF4A4 clusters", 4, "per_channel_group", normal_float=True)
FORMS = (
    W4A4,
    W8A8,
    NF4A4,
    Form("W4A4 per channel", 4, "per_channel"),
    Form("W8A8 per channel", 8, "per_channel"),
)
TOKEN = (Form("W4A4 per token", 4, "per_token"), Form("W8A8 per token", 8, "per_token"))


@dataclass(frozen=True)
class Sizes:
    """Sizes of a run.

    Attributes:
        models: Names of the architectures.
        group: Number of channels of a group or cluster.
        shapes: Shapes of the weights whose products are checked, [out, in].
        rows: Numbers of rows of their inputs.
        batches: Numbers of sequences that are decoded together.
        text, answer: Tokens of text and of the answer in ScienceQA's mix.
        long, short: Tokens of the prompt and answer for comparison.
        repeats: Number of calls whose median is taken.
        problems: Number of problems that the miniatures answer.
        layers: Number of layers of decoder and tower that methods quantize.
        samples: Size of the calibration set.
    """

    models: tuple[str, ...]
    group: int
    shapes: tuple[tuple[int, int], ...]
    rows: tuple[int, ...]
    batches: tuple[int, ...]
    text: int
    answer: int
    long: int
    short: int
    repeats: int
    problems: int
    layers: tuple[int, int]
    samples: int


FULL = Sizes(
    models=("llava_13b", "llava_7b"),
    group=128,
    shapes=((5120, 5120), (13824, 5120), (5120, 13824)),
    rows=(1, 4, 16, 316, 1024),
    batches=(1, 16),
    text=TEXT,
    answer=ANSWER,
    long=LONG,
    short=SHORT,
    repeats=7,
    problems=200,
    layers=(2, 2),
    samples=64,
)
TINY = Sizes(
    models=("tiny",),
    group=64,
    shapes=((16, 64),),
    rows=(1, 5),
    batches=(1,),
    text=2,
    answer=2,
    long=6,
    short=1,
    repeats=1,
    problems=2,
    layers=(1, 2),
    samples=2,
)
