"""docs/results.md, written from the JSON files of the runs: no figure in it is typed by hand."""

from collections.abc import Sequence
from pathlib import Path

from base import Experiment, Place

from exit_plugins.exits.files import atomic_write

INTRODUCTION = """# Results

Does each paper's claim hold on real images, at a size that two CPU cores can train? Every table and picture here is
written by `make experiments` from the JSON files in [results/](results), one per run, with its settings, seed, commit
and machine; the same command runs whatever is missing and goes on with what was stopped. Networks train on the whole
training split and are scored on the test split when their schedule has ended; thresholds are solved on one half of the
test images and scored on the other, over five random halvings.

± is the standard error over seeds, of differences that are paired by seed; another draw of test images would change
figures besides. *Shown* and *against* ask for a one-sided test at 5 %: Student's t over the seeds, or, where there is a
single one, a difference that the draw of the test images does not explain. All else is *not shown*.

"""


def write_report(experiments: Sequence[Experiment], place: Place, page: Path) -> None:
    """Write the page; experiments without a single result are named at its end."""
    parts, missing = [], []
    for experiment in experiments:
        results = experiment.results(place)
        if not results:
            missing.append(experiment)
            continue
        pictures = place.results / experiment.name
        title = f"## {experiment.title}\n\n**Claim.** {experiment.claim}\n\n"
        title += f"**The paper.** {experiment.paper}\n\n**Here.** {experiment.setup}\n\n"
        outlook = f"\n**What would change it.** {experiment.outlook}\n"
        done = f"`make experiments ONLY={experiment.name}` ({len(results)} of {len(experiment.runs)} runs done"
        hours = sum(result.get("cpu_seconds", 0) for result in results) / 3600
        if hours:
            done += f", {hours:.1f} core-hours"
        parts.append(title + experiment.section(results, pictures) + outlook + f"\n{done})\n")
    if missing:
        names = ", ".join(f"`{experiment.name}` ({experiment.title})" for experiment in missing)
        parts.append(f"## Not run yet\n\n{names}.\n")
    page.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(page) as file:
        file.write(INTRODUCTION + "\n".join(parts))
    print(f"{page}: {len(experiments) - len(missing)} of {len(experiments)} experiments have results")
