"""What tokens cost, from a table of the user's: prices change too often to be built in."""

import dataclasses

from llava_jax.endpoint.request import Response
from llava_jax.errors import UserError
from llava_jax.files import json_type, read_json

NAMED = 10  # models of a table that a message names, at most


@dataclasses.dataclass(frozen=True)
class Price:
    """Of one model, in USD per million tokens.

    Attributes:
      prompt, completion: of tokens read and written; a reasoning model's thoughts are written.
      cached: of prompt tokens that the server had cached; as `prompt` if the table has none.
      batch: factor on all of it in the Batch API; 1 if the table has none.
    """

    prompt: float
    completion: float
    cached: float
    batch: float = 1.0

    def cost(self, reply: Response) -> float:
        """USD that a reply cost."""
        return self.of(reply.prompt_tokens, reply.completion_tokens, reply.cached_tokens, reply.batch)

    def of(self, prompt: float, completion: float, cached: float = 0, batch: bool = False) -> float:
        """USD that so many tokens cost; `cached` of `prompt` are."""
        usd = (prompt - cached) * self.prompt + cached * self.cached + completion * self.completion
        return usd / 1e6 * (self.batch if batch else 1)


def load_price(path: str, model: str) -> Price:
    """The price of a model from a JSON file.

    {"MODEL": {"prompt": 1.25, "completion": 10, "cached": 0.125, "batch": 0.5}, ...}
    Raises UserError with one line that names file, model and field.
    """
    table = read_json(path)
    if model not in table:
        names = [f"{name:.80}" for name in table][:NAMED]
        raise UserError(f"{path}: no prices of {model!r}; it has {', '.join(names) or 'none'}"
                        + f" and {len(table) - NAMED:,} more" * (len(table) > NAMED))
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
