"""Prices of tokens, from the user's table, because prices change too often to be built in."""

import dataclasses

from llava_jax.endpoint.request import Response
from llava_jax.errors import UserError
from llava_jax.files import json_type, read_json

MAX_NAMED_MODELS = 10
"""Maximum number of a table's models that a message names."""


@dataclasses.dataclass(frozen=True)
class Price:
    """Prices of one model, in USD per million tokens.

    Attributes:
      prompt, completion: Prices of tokens read and written. Hidden reasoning is written.
      cached: Price of prompt tokens that the server had cached. Defaults to `prompt`.
      batch: Factor on all prices in the Batch API. Defaults to 1.
    """

    prompt: float
    completion: float
    cached: float
    batch: float = 1.0

    def cost(self, response: Response) -> float:
        """Returns the USD that a response cost."""
        return self.of(response.prompt_tokens, response.completion_tokens, response.cached_tokens, response.batch)

    def of(self, prompt: float, completion: float, cached: float = 0, batch: bool = False) -> float:
        """Returns the USD that numbers of tokens cost. `cached` tokens are part of `prompt`."""
        usd = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        return usd / 1e6 * (self.batch if batch else 1)


def load_price(path: str, model: str) -> Price:
    """Reads the price of a model from a JSON file.

    The file is {"MODEL": {"prompt": 1.25, "completion": 10, "cached": 0.125, "batch": 0.5}, ...}.
    Raises UserError, one line that names file, model and field.
    """
    table = read_json(path)
    if model not in table:
        names = [f"{name:.80}" for name in table][:MAX_NAMED_MODELS]
        raise UserError(f"{path}: no prices of {model!r}; it has {', '.join(names) or 'none'}"
                        + f" and {len(table) - MAX_NAMED_MODELS:,} more" * (len(table) > MAX_NAMED_MODELS))
    if not isinstance(table[model], dict):
        raise UserError(f"{path}: {model}: must be an object of prices, and is {json_type(table[model])}")
    row, fields = table[model], [field.name for field in dataclasses.fields(Price)]
    for name, value in row.items():
        if name not in fields:
            raise UserError(f"{path}: {model}: unknown field {name!r:.40}; there are {', '.join(fields)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e9:
            raise UserError(f"{path}: {model}: {name} is {value!r:.40}, not a price")
    for name in ("prompt", "completion"):
        if name not in row:
            raise UserError(f"{path}: {model}: {name!r} is missing (USD per million tokens)")
    return Price(**{"cached": row["prompt"], **row})
