"""`offloop verify-resume`: prints the verdict."""

from rich.console import Console
from rich.table import Table

from offloop.engine.tools.verify_resume import Verdict


def print_verdict(console: Console, verdict: Verdict) -> None:
    """Print the attempts, the first differences and their likely causes."""
    count = len(verdict.reference.runs)
    console.print(
        f"Uninterrupted: {len(verdict.reference.steps)} steps" + (f" in {count} runs" if count > 1 else "")
    )
    table = Table("  attempt", box=None, padding=(0, 2, 0, 0))
    for column in ("resumed at step", "exactness", "last step", "end"):
        table.add_column(column)
    for number, attempt in enumerate(verdict.attempts):
        resumed = list(attempt.resumed.values())
        last = max(attempt.steps, default=(0, 0))[1]
        end = (
            "kill -9" if attempt.was_killed else ("complete" if not attempt.code else f"code {attempt.code}")
        )
        table.add_row(
            f"  {number}",
            f"{attempt.resumed_at[-1]}" if attempt.resumed_at else "-",
            # A quick kill may come before the run reports it.
            resumed[-1]["exactness"] if resumed else "-",
            f"{last}" if attempt.steps else "-",
            end,
        )
    console.print(table)
    found = {difference.kind: difference for difference in verdict.differences}
    table = Table("  compared", box=None, padding=(0, 2, 0, 0))
    table.add_column("bits", overflow="fold")
    for kind in ("first weights", "data", "random numbers", "losses", "number of steps", "final state"):
        difference = found.get(kind)
        text = "equal"
        if difference is not None:
            run = f" of run {difference.run}" if count > 1 else ""
            where = (
                "" if kind in ("first weights", "final state") else f" from step {difference.step}{run} on"
            )
            text = f"different{where}: {difference.detail}"
        elif verdict.attempts[-1].code and kind in ("number of steps", "final state"):
            text = "not reached"
        table.add_row(f"  {kind}", text)
    console.print(table)
    for cause in verdict.causes:
        console.print(f"Likely cause: {cause}", soft_wrap=True)
    if any(run["resume"] is None for run in verdict.reference.runs):
        console.print(
            'Note: the script passes no resume=; with train(..., resume="auto") it resumes without this command.'
        )
    computes = "computes" if verdict.is_equal else "does not compute"
    console.print(f"The killed and resumed script {computes} the same bits.")
