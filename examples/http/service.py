#!/usr/bin/env python3
"""Tasks for an HTTP service that you have already: the worker POSTs the args, the status code is the outcome.

    python3 examples/http/service.py &
    target/release/tasklane-producer &
    target/release/tasklane-worker --config examples/http/tasklane.toml &
    curl 'http://127.0.0.1:8080/v1/tasks?wait_ms=5000' --json '{"kind": "crm.sync", "args": {"customer": 7}}'

The first call for each customer answers 503 with Retry-After, as a service under load does, and the worker tries again.
"""

import http.server
import json
import sys

done = {}  # the results by Idempotency-Key; a real service keeps them as long as a task may be repeated
seen = set()


class Service(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        args = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.headers["Idempotency-Key"]  # the task's id: the same for all of its attempts
        customer = args.get("customer") if isinstance(args, dict) else None
        if not isinstance(customer, int):
            self.answer(422, {"error": "customer must be a number"})  # 4xx: discarded, no attempt will help
        elif customer not in seen:
            seen.add(customer)
            self.answer(503, {"error": "busy"}, {"Retry-After": "1"})  # tried again, one second later
        else:
            attempt = int(self.headers["Tasklane-Attempt"])
            done.setdefault(key, {"customer": customer, "synced_in_attempt": attempt})
            self.answer(200, done[key])  # 2xx: completed, the body is the result

    def answer(self, status, body, headers=None):
        body = json.dumps(body).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


port = int(sys.argv[1]) if len(sys.argv) > 1 else 9000
server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Service)
print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
try:
    server.serve_forever()
except KeyboardInterrupt:
    pass
