#!/usr/bin/env python3
"""A task in any language: args come as JSON on stdin, the result goes to stdout. The worker's operator names the program.

    make programs up
    target/release/tasklane-producer &
    target/release/tasklane-worker --config examples/python/tasklane.toml &
    curl 'http://127.0.0.1:8080/v1/tasks?wait_ms=5000' --json '{"kind": "text.count", "args": {"text": "to be or not to be"}}'
"""

import collections
import json
import os
import sys

DISCARD = 65  # no other attempt will help; every other exit code but 0 means: try again later

args = json.load(sys.stdin)
text = args.get("text") if isinstance(args, dict) else None
if not isinstance(text, str):
    print("args.text must be a string", file=sys.stderr)  # the end of stderr becomes the task's error message
    sys.exit(DISCARD)

words = text.split()
json.dump(
    {
        "words": len(words),
        "most_common": collections.Counter(words).most_common(3),
        "task": os.environ["TASKLANE_TASK_ID"],
        "attempt": int(os.environ["TASKLANE_ATTEMPT"]),
        "fence": int(os.environ["TASKLANE_FENCE"]),
    },
    sys.stdout,
)
