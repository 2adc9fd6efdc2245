"""The ledger `privacy.json`: what every private stage spent on which data, and what that is worth together."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlhf_jax.data.units import normalized_prompt, shared_units, unit_of
from rlhf_jax.errors import UserError
from rlhf_jax.privacy.accounting import check_delta
from rlhf_jax.privacy.ledger import Spent, joint_claim, statement
from rlhf_jax.privacy.plan import plan_of
from rlhf_jax.stages.context import Context
from rlhf_jax.stages.private import CLAIM_FILE
from rlhf_jax.stages.provenance import RAW, claims, data_fields, is_public, private_stages, provenance, public_inputs
from rlhf_jax.training.checkpoints import write_json

LEDGER_FILE = "privacy.json"
DataKey = tuple[Any, ...]  # what a stage reads as units: data, schema, unit, and the state of its files


class Ledger:
    """An experiment's account with its private stages.

    Stages of a sweep read the same few data sets: each is read, and each two are compared, once.
    """

    def __init__(self, workdir: Path, config: ConfigDict, contexts: Mapping[str, Context]):
        self._path, self._config, self._contexts = workdir / LEDGER_FILE, config, contexts
        self._claiming = [name for name in private_stages(config) if claims(config.stages[name])]
        self._counts: dict[DataKey, int] = {}
        self._shared: dict[tuple[DataKey, DataKey], int] = {}

    def overlaps(self) -> list[dict[str, Any]]:
        """Pairs of claiming stages that share units, as far as their data is there: {"stages": [a, b], "shared", "of"}.

        Units are the same by name where both stages name them by one field, else by normalized prompt.

        Raises:
          UserError: a record lacks the field that names its unit; a delta is not below 1 / units; units are shared and
            `privacy.overlap` is "refuse".
        """
        config = self._config
        names = [name for name in self._claiming if _there(self._contexts[name])]
        data = {name: _data_key(self._contexts[name]) for name in names}
        read: dict[DataKey, list[tuple[str, str]]] = {}

        def units(name: str) -> list[tuple[str, str]]:
            if data[name] not in read:
                read[data[name]] = _units(self._contexts[name])
            return read[data[name]]

        for name in names:
            if data[name] not in self._counts:
                self._counts[data[name]] = len({unit for unit, _ in units(name)})
            check_delta(config.stages[name].privacy.delta, self._counts[data[name]], f"stages.{name}.privacy.delta")
        found: list[dict[str, Any]] = []
        for a, b in itertools.combinations(names, 2):
            pair = data[a], data[b]
            if pair not in self._shared:
                fields = {config.stages[name].privacy.unit for name in (a, b)}
                self._shared[pair] = len(shared_units(units(a), units(b), by_name=len(fields) == 1 and fields != {""}))
            if self._shared[pair]:
                found.append({"stages": [a, b], "shared": self._shared[pair], "of": self._counts[data[a]]})
        if found and config.privacy.overlap == "refuse":
            (a, b), count = found[0]["stages"], found[0]["shared"]
            raise UserError(
                f"stages.{b} and stages.{a} share {count} privacy unit(s): each one's epsilon is then spent on them "
                'twice; give them disjoint data, or set privacy.overlap="compose" to have the epsilons added up'
            )
        return found

    def write(self) -> dict[str, Any] | None:
        """Writes what was spent so far, a run that has begun counting whole; returns it, None where nothing was.

        Runs stay in it when their stages are deleted: what they gave away they gave away.
        """
        config, runs = self._config, self._runs()
        if not runs:
            return None
        spent = [Spent(run["stage"], plan_of(run["claim"]).mechanism, run["claim"]["delta"]) for run in runs.values()]
        begun = list(dict.fromkeys(run["stage"] for run in runs.values()))
        overlaps = [overlap for overlap in self.overlaps() if set(overlap["stages"]) <= set(begun)]
        kinds = provenance(config)
        shared = [tuple(overlap["stages"]) for overlap in overlaps]
        gone = set(begun) - set(self._claiming)  # whom they hid is not known any more
        shared += [(stage, other) for stage in gone for other in begun if other != stage]
        joint = joint_claim(spent, shared)
        units = sorted({run["data"]["unit"] for run in runs.values()})
        data = {value: is_public(config, value) for name in config.stages for _, value in data_fields(config, name)}
        ledger = {
            "claim": joint,
            "statement": statement(
                joint,
                unit=" or ".join(units),
                names=begun,
                raw=[name for name, kind in kinds.items() if kind == RAW],
                public=[value for value, public in data.items() if public],
                trusted=list(dict.fromkeys(value for name in config.stages for value in public_inputs(config, name))),
                discarded=sum(run["state"] == "deleted" for run in runs.values()),
            ),
            "overlaps": overlaps,
            "stages": kinds,
            "data": {value: "public" if public else "private" for value, public in data.items()},
            "runs": runs,
        }
        write_json(self._path, ledger)
        return ledger

    def _runs(self) -> dict[str, Any]:
        """Nonce -> every run that was ever begun here."""
        old = json.loads(self._path.read_text()) if self._path.exists() else {}
        runs: dict[str, Any] = {nonce: {**run, "state": "deleted"} for nonce, run in old.get("runs", {}).items()}
        for name in self._claiming:
            folder = self._contexts[name].folder
            if (folder / CLAIM_FILE).exists():
                begun = json.loads((folder / CLAIM_FILE).read_text())
                runs[begun["nonce"]] = {
                    "stage": name,
                    "state": "finished" if (folder / "result.json").exists() else "begun",
                    "data": begun["data"],
                    "claim": begun["claim"],
                }
        return runs


def _there(context: Context) -> bool:
    """Whether the stage's data can be read already: no stage has still to make it."""
    names = context.data_names("data")
    made = [name for name in names if name.split("/")[0] in context.experiment.stages]
    return all(context.path(name).exists() for name in made)


def _units(context: Context) -> list[tuple[str, str]]:
    """(unit, normalized prompt) of every record that a private stage trains on."""
    config, field = context.config, context.config.privacy.unit
    records, _ = context.records(config.data, config.schema)
    where = f'stages.{context.name}.privacy.unit "{field}", {config.data}'
    return [(unit_of(record, i, field, where), normalized_prompt(record)) for i, record in enumerate(records)]


def _data_key(context: Context) -> DataKey:
    config = context.config
    paths = [context.resolve(name) for name in context.data_names("data")]
    states = [(path.stat().st_mtime_ns, path.stat().st_size) if path and path.is_file() else None for path in paths]
    return (config.data, config.schema, config.privacy.unit, *states)
