"""python -m evals.harness ARGUMENTS: lm-eval's own command, with our models registered as `--model manyformer`.

lm-eval 0.4.13 finds models in its own registry only and has no hook for others; this command registers ours and hands
all arguments on. Example:

    python -m evals.harness run --model manyformer --model_args checkpoint=runs/x --tasks my_task --include_path tasks
"""

from __future__ import annotations

import sys

from llm.core.errors import UserError


def main() -> int:
    """Run lm-eval's command; exit code 2 at a mistake of the user."""
    try:
        from evals.harness.run import import_lm_eval

        import_lm_eval()
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        print(f"evals.harness: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
