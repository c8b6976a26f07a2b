"""What the packaged weights are worth: the default run with and without them, over several seeds.

Run: ``python -m benchmarks.pretraining`` (a table on stdout; ``--json FILE`` keeps the figures). Finished
runs found in that file under the SHA-256 of the present weights are not run again.
"""

import argparse
import itertools
import json
import statistics
from pathlib import Path

from tools.simulation import SimulationSuperLink

APP = Path(__file__).resolve().parents[1]
WEIGHTS = APP / "task" / "weights" / "vit_pico.json"
RUN_SECONDS = 3600.0
"""How long a run may take; some minutes on two cores."""
BACKBONES = ("vit_pico", "vit_pico_random")


def accuracies(runs_dir: Path) -> list[float]:
    """Read the central accuracy of every round of the newest run in a folder."""
    newest = max(runs_dir.iterdir())
    lines = (newest / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["central"]["accuracy"] for line in lines]


def measure(link: SimulationSuperLink, backbone: str, seed: int, runs_dir: Path) -> list[float]:
    """Run the default app once and return its accuracy per round."""
    folder = runs_dir / f"{backbone}-{seed}"
    config = [f'backbone="{backbone}" seed={seed}']
    outcome = link.run(APP, run_config=config, runs_dir=folder, timeout=RUN_SECONDS, output=None)
    if not outcome.completed:
        raise SystemExit(outcome.summary)
    return accuracies(folder)


def table(results: dict[str, list[float]]) -> str:
    """Format accuracy per round as Markdown: a row per run, and a row of means per backbone."""
    rounds = max(map(len, results.values()))
    head = ["backbone", "seed", *(f"round {i}" for i in range(rounds))]
    rows = [head, ["---"] * len(head)]
    for backbone, runs in itertools.groupby(results.items(), key=lambda item: item[0].rpartition("-")[0]):
        series = [(key.rpartition("-")[2], values) for key, values in runs]
        rows += [[backbone, seed, *(f"{100 * value:.1f}" for value in values)] for seed, values in series]
        columns = zip(*(values for _, values in series), strict=True)
        rows.append([backbone, "mean", *(f"**{100 * statistics.mean(column):.1f}**" for column in columns)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=APP / "runs" / "bench" / "pretraining.json")
    arguments = parser.parse_args()
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    kept = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
    results = kept.setdefault(json.loads(WEIGHTS.read_text())["sha256"], {})
    with SimulationSuperLink() as link:
        for backbone, seed in itertools.product(BACKBONES, arguments.seeds):
            key = f"{backbone}-{seed}"
            if key not in results:
                results[key] = measure(link, backbone, seed, arguments.json.parent / "pretraining")
                arguments.json.write_text(json.dumps(kept, indent=1))
            print(f"{key}: {100 * results[key][-1]:.1f} % after {len(results[key]) - 1} rounds", flush=True)
    print(table(dict(sorted(results.items()))))


if __name__ == "__main__":
    main()
