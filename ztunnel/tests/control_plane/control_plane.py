"""A control plane of a foreign gRPC implementation: what it is told on stdin it sends, what it hears it prints.

stdin, one JSON object a line:
  {"push": TYPE, "set": {NAME: [VERSION, MESSAGE]}, "remove": [NAME]}   one response; also kept for later streams
  {"hold": TYPE, "set": ..., "remove": ...}                              kept only
  {"hang_up": true}                                                      ends the stream
stdout: {"listening": PORT}, {"stream": METADATA}, {"request": ...}, {"ended": true}
TYPE is "address" or "authorization"; MESSAGE as protobuf's JSON.
"""
import json, os, queue, sys, tempfile, threading
from concurrent import futures

import grpc
from google.protobuf import json_format
from grpc_tools import protoc

here = os.path.dirname(os.path.abspath(__file__))
made = tempfile.mkdtemp()
names = ["discovery", "istio", "security"]
include = os.path.join(os.path.dirname(sys.modules["grpc_tools"].__file__), "_proto")
assert 0 == protoc.main(
    ["protoc", f"-I{here}", f"-I{include}", f"--python_out={made}", f"--grpc_python_out={made}"]
    + [os.path.join(here, f"{name}.proto") for name in names]
)
sys.path.insert(0, made)
import discovery_pb2, discovery_pb2_grpc, istio_pb2, security_pb2

URLS = {
    "address": "type.googleapis.com/istio.workload.Address",
    "authorization": "type.googleapis.com/istio.security.Authorization",
}
MESSAGES = {"address": istio_pb2.Address, "authorization": security_pb2.Authorization}
KINDS = {url: kind for kind, url in URLS.items()}
state = {kind: {} for kind in URLS}
lock = threading.Lock()
streams = []
nonce = 0


def say(**what):
    with lock:
        print(json.dumps(what), flush=True)


def resource(kind, name, version, message):
    content = MESSAGES[kind]()
    json_format.ParseDict(message, content)
    made = discovery_pb2.Resource(name=name, version=version)
    made.resource.type_url = URLS[kind]
    made.resource.value = content.SerializeToString()
    return made


def response(kind, changed, removed):
    global nonce
    nonce += 1
    resources = [resource(kind, name, *state[kind][name]) for name in changed]
    return discovery_pb2.DeltaDiscoveryResponse(
        type_url=URLS[kind], nonce=str(nonce), resources=resources, removed_resources=removed
    )


class Service(discovery_pb2_grpc.AggregatedDiscoveryServiceServicer):
    def DeltaAggregatedResources(self, requests, context):
        say(stream=dict(context.invocation_metadata()))
        out = queue.Queue()
        streams.append(out)

        def hear():
            try:
                for request in requests:
                    kind = KINDS.get(request.type_url, request.type_url)
                    held = dict(request.initial_resource_versions)
                    say(request=kind, node=request.node.id,
                        metadata=json_format.MessageToDict(request.node.metadata) if request.HasField("node") else None,
                        subscribe=list(request.resource_names_subscribe),
                        unsubscribe=list(request.resource_names_unsubscribe),
                        versions=held, nonce=request.response_nonce, error=request.error_detail.message)
                    if not request.response_nonce:
                        changed = [n for n, (version, _) in state[kind].items() if held.get(n) != version]
                        out.put(response(kind, changed, [n for n in held if n not in state[kind]]))
            except grpc.RpcError:
                pass
            except Exception as error:  # the stream went away
                say(note=str(error))
            say(ended=True)
            out.put(None)

        threading.Thread(target=hear, daemon=True).start()
        while (one := out.get()) is not None:
            yield one


certificate, key = (open(path, "rb").read() for path in sys.argv[1:3])
server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
discovery_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(Service(), server)
port = server.add_secure_port(f"127.0.0.1:{sys.argv[3]}", grpc.ssl_server_credentials([(key, certificate)]))
server.start()
say(listening=port)
for line in sys.stdin:
    command = json.loads(line)
    if "hang_up" in command:
        while streams:
            streams.pop().put(None)
        continue
    kind = command.get("push") or command["hold"]
    for name in command.get("remove", []):
        state[kind].pop(name, None)
    state[kind].update(command.get("set", {}))
    if "push" in command:
        for out in streams[-1:]:
            out.put(response(kind, list(command.get("set", {})), command.get("remove", [])))
server.stop(None)
