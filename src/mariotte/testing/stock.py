"""What stock transformers makes of a checkpoint, in a process that cannot import Mariotte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

_ALONE = """
import sys
sys.modules["mariotte"] = None  # any import of it is now an ImportError
try:
    import mariotte
except ImportError:
    pass
else:
    raise SystemExit("mariotte could be imported")
"""

_OUR_CLASS = """
import json
import torch
from transformers import AutoModelForCausalLM
prompts, settings = torch.tensor(json.loads(sys.argv[1])), json.loads(sys.argv[2])
for folder in sys.argv[3:]:
    try:
        AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error), error
    else:
        raise SystemExit(f"{folder} loads without trust")
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    print(json.dumps(model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings).tolist()))
    model.save_pretrained(folder + "-again")
    again = AutoModelForCausalLM.from_pretrained(folder + "-again", trust_remote_code=True)
    assert torch.equal(model(prompts).logits, again(prompts).logits)
"""


def without_mariotte(code: str, *arguments: str, environment: Mapping[str, str] | None = None) -> list[str]:
    """Run Python where Mariotte cannot be imported; what it prints, line by line.

    Parameters
    ----------
    code : finds its `arguments` in ``sys.argv[1:]``; ``sys`` is imported
    environment : variables beside those of this process
    """
    script = [sys.executable, "-c", _ALONE + code, *arguments]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, **(environment or {})})
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def generated_by_our_class(
    folders: Iterable[Path], prompts_BT: Tensor, modules: Path, **settings: Any
) -> list[list[list[int]]]:
    """Tokens that checkpoints of a class of ours generate: refused without trust, the same after being saved again.

    Parameters
    ----------
    modules : where transformers may copy the class to
    settings : of ``generate``

    Returns
    -------
    for each checkpoint and each prompt the tokens, those of the prompt among them
    """
    arguments = [json.dumps(prompts_BT.tolist()), json.dumps(settings), *map(str, folders)]
    printed = without_mariotte(_OUR_CLASS, *arguments, environment={"HF_MODULES_CACHE": str(modules)})
    return [json.loads(line) for line in printed if line.startswith("[")]
