"""How the language model's activations of a record are quantized, in the words of pages."""

from qvlm.records.record import Record

# Granularity of the language model's activations -> how pages call it, from coarse to fine.
GRANULARITIES = {
    "per_tensor": "static, per tensor",
    "per_channel_group": "static, clusters",
    "per_channel": "static, per channel",
    "per_token": "per token",
    "per_channel_prompt": "per channel of the prompt",
}
FIRST_IN_FLOAT = ", first token in float"
PER_TOKEN = ", per token"  # ends the names of methods that say so themselves


def activations(record: Record) -> str:
    """Says in words how a record quantizes the language model's activations."""
    quantizer = record.run["influences"]["quantizer"]
    own = record.method.endswith(PER_TOKEN)
    words = GRANULARITIES["per_token" if own else quantizer["language"]["granularity"]]
    return words + (FIRST_IN_FLOAT if quantizer.get("first_token") == "float" else "")
