"""The testbed's models: their names, shapes and training records, and the tokenizer of their language."""

from __future__ import annotations

import json
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from mariotte.errors import ModelError, UnknownNameError
from mariotte.testbed.world import BOS, PADDING, UNKNOWN, World

POSITIONS: Final = 256
RECORD: Final = "training.json"
WEIGHTS: Final = Path(__file__).parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Parameters
    ----------
    tokens : how many are seen
    batch : rows of 64 tokens a step
    muon_rate : learning rate of Muon, on the matrices inside the blocks
    adamw_rate : learning rate of AdamW, on all else
    constant : share of the run at the full rates, after which they fall linearly
    init : standard deviation of the initial weights
    seed : of the initial weights
    """

    tokens: int = 3_000_000
    batch: int = 16
    muon_rate: float = 0.012
    adamw_rate: float = 5e-3
    constant: float = 0.3
    init: float = 0.04
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Specification:
    """The shape of a model and its recipe."""

    name: str
    family: Literal["qwen2", "llama"]
    hidden: int
    n_layers: int
    n_heads: int
    n_key_value_heads: int
    ffn: int
    tied: bool
    recipe: Recipe = Recipe()

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.n_heads

    @property
    def n_params(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        d, kv = self.hidden, self.n_key_value_heads * self.head_width
        biases = d + 2 * kv if self.family == "qwen2" else 0
        block = 2 * d * d + 2 * d * kv + biases + 3 * d * self.ffn + 2 * d
        return block * self.n_layers + d + len(World().vocabulary) * d * (1 if self.tied else 2)

    def config(self) -> dict[str, Any]:
        """The fields of the transformers config, the width of a head among them: pruned copies keep it."""
        return {
            "vocab_size": len(World().vocabulary),
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.n_layers,
            "num_attention_heads": self.n_heads,
            "num_key_value_heads": self.n_key_value_heads,
            "head_dim": self.head_width,
            "max_position_embeddings": POSITIONS,
            "tie_word_embeddings": self.tied,
            "initializer_range": self.recipe.init,
            "bos_token_id": 0,
            "eos_token_id": None,
            "pad_token_id": 2,
        }


_SPECIFICATIONS: Final = MappingProxyType(
    {
        specification.name: specification
        for specification in (
            Specification(
                name="qwen2-46k",
                family="qwen2",
                hidden=32,
                n_layers=2,
                n_heads=2,
                n_key_value_heads=1,
                ffn=96,
                tied=True,
            ),
            Specification(
                name="qwen2-113k",
                family="qwen2",
                hidden=48,
                n_layers=3,
                n_heads=3,
                n_key_value_heads=1,
                ffn=144,
                tied=True,
            ),
            Specification(
                name="llama-146k",
                family="llama",
                hidden=48,
                n_layers=3,
                n_heads=3,
                n_key_value_heads=3,
                ffn=128,
                tied=False,
            ),
            Specification(
                name="qwen2-345k",
                family="qwen2",
                hidden=80,
                n_layers=4,
                n_heads=5,
                n_key_value_heads=1,
                ffn=240,
                tied=True,
            ),
            Specification(
                name="llama-483k",
                family="llama",
                hidden=80,
                n_layers=5,
                n_heads=5,
                n_key_value_heads=5,
                ffn=208,
                tied=False,
            ),
            Specification(
                name="qwen2-1m",
                family="qwen2",
                hidden=128,
                n_layers=5,
                n_heads=4,
                n_key_value_heads=2,
                ffn=352,
                tied=True,
            ),
            Specification(
                name="llama-1m",
                family="llama",
                hidden=128,
                n_layers=7,
                n_heads=4,
                n_key_value_heads=2,
                ffn=344,
                tied=False,
            ),
            Specification(
                name="qwen2-2m",
                family="qwen2",
                hidden=192,
                n_layers=6,
                n_heads=6,
                n_key_value_heads=2,
                ffn=448,
                tied=True,
                recipe=Recipe(tokens=4_000_000),
            ),
        )
    }
)
NAMES: Final = tuple(_SPECIFICATIONS)


def specification(name: str) -> Specification:
    """The specification of a model of the testbed.

    Raises
    ------
    UnknownNameError
        When the testbed has no such model.
    """
    name = name.removeprefix("testbed/")
    if name not in _SPECIFICATIONS:
        close = get_close_matches(name, NAMES, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(NAMES)}"
        raise UnknownNameError(f"the testbed has no model '{name}'; {hint}")
    return _SPECIFICATIONS[name]


def path(name: str) -> Path:
    """The checkpoint folder of a model of the testbed, which ``transformers`` loads.

    Raises
    ------
    UnknownNameError
        When the testbed has no such model.
    ModelError
        When its weights are not in this installation.
    """
    folder = WEIGHTS / specification(name).name
    if not (folder / RECORD).is_file():
        raise ModelError(
            f"the weights of '{name}' are not in this installation, expected {folder}; "
            f"make them with 'mariotte testbed train {folder.name} --out {folder}'"
        )
    return folder


def training_record(name: str) -> dict[str, Any]:
    """What is known of the training of a model: recipe, cost, loss and floor on the same rows, facts known."""
    return json.loads((path(name) / RECORD).read_text(encoding="utf-8"))


def save_tokenizer(folder: Path) -> None:
    """Write the tokenizer of the testbed's language: one word is one token, ``<bos>`` comes first.

    Notes
    -----
    ``PreTrainedTokenizerFast`` reads it as it is written, and decodes words with spaces between. ``AutoTokenizer`` does
    so too for Llama-shaped models; for ``model_type`` qwen2 it insists on its own class, which replaces the rules of
    the file by byte-level ones (transformers 5.23). Every word is therefore also an added token: those are
    matched before any rule, so that text is encoded rightly there as well, though decoded without spaces.
    """
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

    words = World().vocabulary
    specials = [BOS, UNKNOWN, PADDING]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True) for word in words[len(specials) :]])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        # A document ends where the next begins. Without it the class of qwen2 adds a token that no model has.
        "eos_token": BOS,
        "unk_token": UNKNOWN,
        "pad_token": PADDING,
        "clean_up_tokenization_spaces": False,
        "model_max_length": POSITIONS,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
