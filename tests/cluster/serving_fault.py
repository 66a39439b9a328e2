"""An endpoint whose replicas run on two hosts, of which one dies under load."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from apprentice.serve.api.limits.api_keys import KEYS_FILE
from tests.cluster.hosts import Hosts
from tests.cluster.runs import LONGEST_S, Place

# On the head, as a load balancer would: requests go round the hosts, and one that fails goes to the next.
LOAD = """
import json, sys, time
import httpx
key, count, urls = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
body = {"instruction": "Name a colour.", "input": "", "max_tokens": 8}
texts, again, longest = [], 0, 0.0
client = httpx.Client(timeout=60, trust_env=False, headers={"Authorization": f"Bearer {key}"})
for number in range(count):
    began = time.monotonic()
    for turn in range(100):
        try:
            answer = client.post(urls[(number + turn) % len(urls)] + "/v1/instruct", json=body)
        except httpx.HTTPError:
            answer = None
        if answer is not None and answer.status_code == 200:
            texts.append(answer.json()["choices"][0]["text"])
            break
        again += 1
        time.sleep(0.2)
    longest = max(longest, time.monotonic() - began)
    print(len(texts), flush=True)
print(json.dumps({"answered": len(texts), "texts": sorted(set(texts)), "again": again, "longest": longest}))
"""
PORT, COUNT = 8123, 200


def guard(cluster: Hosts, file: Path) -> None:
    """Makes the cluster's token a key of its endpoints, too: without keys none listens to other hosts."""
    file.write_text(json.dumps({"keys": [{"name": "tests", "sha256": hashlib.sha256(cluster.token.encode()).hexdigest()}]}))
    cluster.variables[KEYS_FILE] = str(file)


def serving_host_dies(place: Place, within_s: float) -> tuple[str, float]:
    cluster = place.cluster
    serving = {"serving__host": "0.0.0.0", "serving__port": PORT, "serving__replicas": {"min": 2, "max": 2}}
    code, said = place.submit("--deploy", training__steps=4, **serving).end
    assert code == 0, said + cluster.logs()
    urls = [f"http://{host.address}:{PORT}" for host in cluster.hosts]
    load = cluster.begin(cluster.hosts[0], "-c", LOAD, cluster.token, str(COUNT), *urls)
    assert load.stdout is not None
    assert any(line == "50\n" for line in load.stdout)
    serving_hosts = cluster.running("ServeReplica:apprentice")
    assert len(serving_hosts) == 2
    cluster.kill(serving_hosts[-1])
    out, err = load.communicate(timeout=LONGEST_S)
    assert load.returncode == 0, err
    outcome = json.loads(out.splitlines()[-1])
    assert (outcome["answered"], len(outcome["texts"])) == (COUNT, 1)
    return f"all of {COUNT} requests are answered alike, {outcome['again']} tries of them by another host", outcome["longest"]
