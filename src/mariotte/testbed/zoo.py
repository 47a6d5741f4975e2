"""The testbed's models: their names, shapes and training records, and the tokenizer of their language."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Literal

from mariotte.errors import ModelError, UnknownNameError
from mariotte.testbed.world import BOS, PADDING, UNKNOWN, World

POSITIONS: Final = 256
BERT_POSITIONS: Final = 128  # learned, of single sentences
MASK, END = "<mask>", "</s>"
SENTINELS: Final = tuple(f"<extra_id_{i}>" for i in range(4))
EXTRA_TOKENS: Final = MappingProxyType({"qwen2": (), "llama": (), "bert": (MASK,), "t5": (END, *SENTINELS)})
"""What a family's vocabulary has after the world's own words."""
RECORD: Final = "training.json"
WEIGHTS: Final = Path(__file__).parent / "weights"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Parameters
    ----------
    tokens : how many are seen, padding of single sentences among them
    batch : rows a step: of 64 tokens for decoders, else single sentences padded to 13
    muon_rate : learning rate of Muon, on the matrices inside the blocks
    adamw_rate : learning rate of AdamW, on all else
    constant : share of the run at the full rates, after which they fall linearly
    init : standard deviation of the initial weights; a T5 begins as its family does
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
    """The shape of a model and its recipe; a T5 has as many layers in its encoder as in its decoder."""

    name: str
    family: Literal["qwen2", "llama", "bert", "t5"]
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
        if self.family == "bert":
            block = 4 * d * d + 2 * d * self.ffn + self.ffn + 9 * d
            embeddings = (self.n_vocabulary + BERT_POSITIONS + 2 + 2) * d
            return embeddings + block * self.n_layers + d * d + 3 * d + self.n_vocabulary
        if self.family == "t5":
            blocks = 12 * d * d + 2 * 3 * d * self.ffn + 5 * d
            return self.n_vocabulary * d + blocks * self.n_layers + 2 * d + 2 * _T5_BUCKETS * self.n_heads
        biases = d + 2 * kv if self.family == "qwen2" else 0
        block = 2 * d * d + 2 * d * kv + biases + 3 * d * self.ffn + 2 * d
        return block * self.n_layers + d + self.n_vocabulary * d * (1 if self.tied else 2)

    @property
    def n_vocabulary(self) -> int:
        """Tokens of the model: the world's words, and what its family needs besides."""
        return len(World().vocabulary) + len(EXTRA_TOKENS[self.family])

    def config(self) -> dict[str, Any]:
        """The fields of the transformers config, the width of a head among them: pruned copies keep it."""
        if self.family == "bert":
            return {
                "vocab_size": self.n_vocabulary,
                "hidden_size": self.hidden,
                "intermediate_size": self.ffn,
                "num_hidden_layers": self.n_layers,
                "num_attention_heads": self.n_heads,
                "max_position_embeddings": BERT_POSITIONS,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
                "initializer_range": self.recipe.init,
                "bos_token_id": 0,
                "eos_token_id": None,
                "pad_token_id": 2,
            }
        if self.family == "t5":
            return {
                "vocab_size": self.n_vocabulary,
                "d_model": self.hidden,
                "d_kv": self.head_width,
                "d_ff": self.ffn,
                "num_layers": self.n_layers,
                "num_decoder_layers": self.n_layers,
                "num_heads": self.n_heads,
                "relative_attention_num_buckets": _T5_BUCKETS,
                "feed_forward_proj": "gated-gelu",
                "dropout_rate": 0.0,
                "bos_token_id": 0,
                "eos_token_id": len(World().vocabulary),
                "pad_token_id": 2,
                "decoder_start_token_id": 2,
            }
        return {
            "vocab_size": self.n_vocabulary,
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


_T5_BUCKETS: Final = 32
# An encoder first learns which words answer a relation, and only after some million tokens who is asked about; of the
# rates and initial weights that were tried over 1,000 steps (bert-181k), these left that plateau first.
_BERT_RECIPE: Final = Recipe(tokens=4_000_000, batch=80, muon_rate=0.003, adamw_rate=0.01, init=0.15)
# A T5's embeddings begin 25 times as large and its logits are divided by the root of the hidden size: the same step
# of AdamW moves them less.
_T5_RECIPE: Final = Recipe(tokens=4_000_000, batch=80, muon_rate=0.006, adamw_rate=0.03)

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
            Specification(
                name="bert-181k",
                family="bert",
                hidden=64,
                n_layers=3,
                n_heads=4,
                n_key_value_heads=4,
                ffn=192,
                tied=True,
                recipe=_BERT_RECIPE,
            ),
            Specification(
                name="bert-459k",
                family="bert",
                hidden=96,
                n_layers=4,
                n_heads=6,
                n_key_value_heads=6,
                ffn=288,
                tied=True,
                recipe=replace(_BERT_RECIPE, tokens=10_000_000),
            ),
            Specification(
                name="t5-265k",
                family="t5",
                hidden=64,
                n_layers=2,
                n_heads=4,
                n_key_value_heads=4,
                ffn=160,
                tied=True,
                recipe=_T5_RECIPE,
            ),
            Specification(
                name="t5-784k",
                family="t5",
                hidden=96,
                n_layers=3,
                n_heads=6,
                n_key_value_heads=6,
                ffn=224,
                tied=True,
                recipe=_T5_RECIPE,
            ),
        )
    }
)
NAMES: Final = tuple(name for name, shape in _SPECIFICATIONS.items() if shape.family in ("qwen2", "llama"))
"""The decoders, by size."""
CLOZE_NAMES: Final = tuple(name for name in _SPECIFICATIONS if name not in NAMES)
"""The encoders and the encoder-decoders, which fill gaps in sentences."""


def specification(name: str) -> Specification:
    """The specification of a model of the testbed.

    Raises
    ------
    UnknownNameError
        When the testbed has no such model.
    """
    name = name.removeprefix("testbed/")
    if name not in _SPECIFICATIONS:
        close = get_close_matches(name, _SPECIFICATIONS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(_SPECIFICATIONS)}"
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


def shipped() -> tuple[str, ...]:
    """The models whose weights are in this installation: the decoders, then those that fill gaps."""
    return tuple(name for name in (*NAMES, *CLOZE_NAMES) if (WEIGHTS / name / RECORD).is_file())


def training_record(name: str) -> dict[str, Any]:
    """What is known of the training of a model: recipe, cost, loss and floor on the same rows, facts known."""
    return json.loads((path(name) / RECORD).read_text(encoding="utf-8"))


def save_tokenizer(folder: Path, family: str = "qwen2") -> None:
    """Write the tokenizer of the testbed's language: one word is one token, ``<bos>`` comes first.

    Parameters
    ----------
    folder : of the checkpoint
    family : "bert" adds ``<mask>``; "t5" adds ``</s>`` and the sentinels ``<extra_id_0>`` to ``<extra_id_3>``. They
        come after the world's words, whose ids are the same in every family

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
    extra = EXTRA_TOKENS[family]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, *extra])}, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words.index(BOS))]
    )
    tokenizer.add_special_tokens(specials)
    tokenizer.add_tokens([AddedToken(word, single_word=True, lstrip=True) for word in words[len(specials) :]])
    # Spaces before a gap belong to it, as those before a word do.
    tokenizer.add_special_tokens([AddedToken(token, special=True, lstrip=True) for token in extra])
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
    if family == "bert":
        settings |= {"mask_token": MASK, "model_max_length": BERT_POSITIONS}
    elif family == "t5":
        settings |= {"eos_token": END, "extra_special_tokens": list(SENTINELS)}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
