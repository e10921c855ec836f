"""Runs exported folders in a process that does not see this project; started as a script by `elsewhere.run`.

usage: python -I -S isolated.py JOBS.json RESULTS.json. Imports nothing of ours, and makes sure that it cannot.
"""

import json
import sys
import time
import traceback

OURS = ("llm", "kernels", "vision", "evals", "launch", "manyformer")
NOT_NEEDED = ("accelerate", "deepspeed")
"""What transformers imports where it is installed, and what brings other libraries along."""


class Without:
    """A finder that finds neither this project's packages, wherever they are installed, nor what is not needed."""

    def __init__(self, finder):  # type: ignore[no-untyped-def]
        self.finder = finder

    def __getattr__(self, name):  # type: ignore[no-untyped-def]
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        return None if name.split(".")[0] in OURS + NOT_NEEDED else self.finder.find_spec(name, path, target)


def main(jobs_path, results_path):  # type: ignore[no-untyped-def]
    """Do all jobs of a file; a job that fails says why in its result."""
    with open(jobs_path) as file:
        request = json.load(file)
    sys.path.extend(request["paths"])
    sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]  # type: ignore[misc]
    for name in OURS:
        try:
            __import__(name)
        except ModuleNotFoundError:
            continue
        sys.exit(f"this process can import {name}")
    import torch

    torch.set_num_threads(request["threads"])
    results = []
    for job in request["jobs"]:
        started = time.perf_counter()
        try:
            with torch.no_grad():
                result = run(job)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            result = {"error": f"{type(error).__name__}: {lines[0]}", "trace": traceback.format_exc()}
        results.append({"seconds": time.perf_counter() - started, **result})
        with open(results_path, "w") as file:
            json.dump({"results": results, "foreign": sorted(set(request["watched"]) & set(sys.modules))}, file)


def run(job):  # type: ignore[no-untyped-def]
    """Load a folder, compute logits at once and through the cache, generate, save again."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype=torch.float32, trust_remote_code=True).eval()
    tokens = load_file(job["tokens"])["tokens"]
    first = max(1, tokens.shape[1] - job["steps"])
    out = model(tokens[:, :first], use_cache=True)
    parts = [out.logits]
    for t in range(first, tokens.shape[1]):
        out = model(tokens[:, t : t + 1], past_key_values=out.past_key_values)
        parts.append(out.logits)
    logits = model(tokens, use_cache=False).logits.contiguous()
    save_file({"logits": logits, "cached": torch.cat(parts, 1)}, job["logits"])
    found: dict = {"class": type(model).__name__, "module": type(model).__module__}
    if job.get("prompts"):
        longest = max(map(len, job["prompts"]))
        rows = [[0] * (longest - len(p)) + p for p in job["prompts"]]
        mask = [[0] * (longest - len(p)) + [1] * len(p) for p in job["prompts"]]
        n_new = job["n_new"]
        options = {"max_new_tokens": n_new, "min_new_tokens": n_new, "pad_token_id": 0, "eos_token_id": None}
        made = model.generate(torch.tensor(rows), attention_mask=torch.tensor(mask), do_sample=False, **options)
        found["generated"] = made[:, longest:].tolist()
    if job.get("save_to"):
        model.save_pretrained(job["save_to"])
        again = AutoModelForCausalLM.from_pretrained(job["save_to"], dtype=torch.float32, trust_remote_code=True).eval()
        found["saved_equal"] = bool(torch.equal(again(tokens, use_cache=False).logits, logits))
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
