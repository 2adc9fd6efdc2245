"""A stage's model as a Hugging Face folder: `<stage>/checkpoint`, which any tool of that ecosystem loads.

Adapters are merged, or written apart as a PEFT folder beside their base.
"""

import shutil
from pathlib import Path
from typing import Any

import jax

from rlhf_jax.distributed.processes import barrier, is_main_process
from rlhf_jax.models.peft import save_peft
from rlhf_jax.models.pretrained import save_pretrained
from rlhf_jax.models.quantized import dequantized
from rlhf_jax.models.roles import merged_base
from rlhf_jax.stages.context import Context


def check(context: Context) -> None:
    """What can be refused before anything runs."""
    context.mesh()


def run(context: Context) -> dict[str, Any]:
    """Writes the folder and returns what is in it."""
    config, mesh = context.config, context.mesh()
    folder, base_folder = context.folder / "checkpoint", context.folder / "base"
    if is_main_process():  # of a run that was cut
        for old in (folder, base_folder):
            shutil.rmtree(old, ignore_errors=True)
    barrier(f"clear {folder}")
    with jax.set_mesh(mesh):
        role = context.load(config.subject, mesh)
        spec, head = role.spec, role.weights.get("head")
        settings: dict[str, Any] = dict(dtype=config.dtype or None, shard_bytes=round(config.shard_gib * 2**30))
        if config.merge or spec.lora is None:
            base = merged_base(spec, role.weights)
            marks: dict[str, Any] = dict(head=head, answer_mark=spec.answer_mark)
            save_pretrained(folder, spec.config, base, role.tokenizer, **marks, **settings)
        else:
            base_path = role.base_checkpoint
            if not base_path:
                whole = dequantized(role.weights["base"])
                save_pretrained(base_folder, spec.config, whole, role.tokenizer, **settings)
                base_path = str(base_folder)
            save_peft(folder, spec.config, spec.lora, role.weights["adapters"], base_path, head, spec.answer_mark)
            if is_main_process():
                role.tokenizer.save(folder)
    barrier(f"wrote {folder}")
    context.progress(f"wrote {folder}")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    figures = {
        "subject": config.subject,
        "family": spec.config.family,
        "parameters": spec.config.parameters,
        "merged": bool(config.merge or spec.lora is None),
        "bytes": sum(sizes.values()),
        "files": list(sizes),
        "folder": str(Path(context.name) / "checkpoint"),
    }
    return {"figures": figures, "samples": []}
