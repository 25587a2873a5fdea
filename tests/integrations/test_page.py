"""docs/transformers.md: its examples run as they stand, and it names what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import tokenizers
import transformers

from adasplash_core.integrations import hf_attention
from adasplash_core.integrations import transformers as door
from adasplash_core.nn import Alpha
from tests.integrations.models import GPT2

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "transformers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PAGE, flags=re.M | re.S)


@pytest.fixture
def _small_gpt2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random model and a tokenizer of a few words where the page's name finds them before it asks a network."""
    folder = tmp_path / "openai-community" / "gpt2"
    GPT2.make("eager").float().save_pretrained(folder)
    words = ["?", "The", "quick", "brown", "fox", *(f"word{n}" for n in range(56))]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="?").save_pretrained(folder)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("_small_gpt2")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_examples_run(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    exec(EXAMPLES[number], names)
    printed = capsys.readouterr().out
    model = names["model"]
    assert model.config._attn_implementation == "entmax"
    assert any(isinstance(m, Alpha) for m in model.modules())
    wanted = ["The quick brown fox", "[1.5, 1.5]", "Alpha(1.5, by schedule)"][number]
    assert wanted in printed


def test_everything_is_named() -> None:
    names = [name for name in door.__all__ if name != "NAME"]
    refused = {"head_mask", "softcap", "s_aux", "position_bias"}
    assert refused <= set(hf_attention._REFUSED)
    assert not [name for name in (*names, *refused, "entmax_alpha", "entmax_backend") if f"{name}" not in PAGE]
