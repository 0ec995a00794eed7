"""Requests that schemathesis makes up ask for less than they may: time should go into requests, not into answers."""

import schemathesis

MOST = {"max_tokens": 64, "max_completion_tokens": 64, "max_output_tokens": 64, "n": 4}


@schemathesis.hook
def map_body(context, body):
    if isinstance(body, dict):
        for key, most in MOST.items():
            if isinstance(body.get(key), int):
                body[key] = min(body[key], most)
        if isinstance(body.get("prompt"), list):
            body["prompt"] = body["prompt"][:4]
    return body
