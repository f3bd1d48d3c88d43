"""A client in any language starts from protos/ alone: here grpcio-tools' stubs, without our SDK."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.e2e.texts import ROOT
from tests.servers import Running

CLIENT = """
import sys
import grpc
from griffin.v1 import generation_pb2 as pb, generation_pb2_grpc

assert pb.__file__.startswith(sys.argv[2]), pb.__file__
with grpc.insecure_channel(sys.argv[1]) as channel:
    stub = generation_pb2_grpc.GenerationServiceStub(channel)
    request = pb.GenerateRequest(
        text="The capital of France is",
        stopping=pb.Stopping(max_tokens=8),
        pruning=pb.Pruning(density=1.0),
    )
    for response in stub.Generate(request, timeout=60):
        if response.WhichOneof("event") == "tokens":
            print(response.tokens.text, end="")
assert "griffin_client" not in sys.modules
"""


def test_a_plain_stub_generates_text(smollm2_server: Running, tmp_path: Path) -> None:
    protos = ROOT / "protos"
    compile_ = ["-m", "grpc_tools.protoc", f"-I{protos}", f"--python_out={tmp_path}"]
    files = [str(path) for path in protos.glob("griffin/v1/*.proto")]
    subprocess.run(
        [sys.executable, *compile_, f"--grpc_python_out={tmp_path}", *files], check=True, timeout=60
    )
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, smollm2_server.target, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=90,
        env={"PYTHONPATH": str(tmp_path)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
