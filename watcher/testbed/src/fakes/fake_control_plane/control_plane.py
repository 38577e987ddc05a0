"""A control plane of a foreign gRPC implementation: what it is told on stdin it sends, what it hears it prints.

It signs certificates too. Arguments: certificate, key, where to listen (HOST:PORT with TLS, or unix:PATH without),
the CA's certificate and its key.

stdin, one JSON object a line:
  {"push": TYPE, "set": {NAME: [VERSION, MESSAGE]}, "remove": [NAME]}   one response; also kept for later streams
  {"hold": TYPE, "set": ..., "remove": ...}                              kept only
  {"hang_up": true}                                                      ends the stream
  {"mute": true}, {"mute": false}                                        names that are asked for are answered only later
  {"hold_back": TYPE}, {"let_go": TYPE}                                  responses of that type are sent only later
stdout: {"listening": PORT}, {"stream": METADATA}, {"request": ...}, {"ended": true}, {"signed": IDENTITY, "with": METADATA}
TYPE is "address" or "authorization"; MESSAGE as protobuf's JSON, or {"raw": BASE64}: any bytes.
"""
import base64, ipaddress, json, os, queue, subprocess, sys, tempfile, threading
from concurrent import futures

import grpc
from google.protobuf import json_format
from grpc_tools import protoc

here = os.path.dirname(os.path.abspath(__file__))
made = tempfile.mkdtemp()
names = ["discovery", "istio", "security", "ca"]
include = os.path.join(os.path.dirname(sys.modules["grpc_tools"].__file__), "_proto")
assert 0 == protoc.main(
    ["protoc", f"-I{here}", f"-I{include}", f"--python_out={made}", f"--grpc_python_out={made}"]
    + [os.path.join(here, f"{name}.proto") for name in names]
)
sys.path.insert(0, made)
import ca_pb2, ca_pb2_grpc, discovery_pb2, discovery_pb2_grpc, istio_pb2, security_pb2

URLS = {
    "address": "type.googleapis.com/istio.workload.Address",
    "authorization": "type.googleapis.com/istio.security.Authorization",
}
MESSAGES = {"address": istio_pb2.Address, "authorization": security_pb2.Authorization}
KINDS = {url: kind for kind, url in URLS.items()}
state = {kind: {} for kind in URLS}
lock = threading.Lock()
streams = []
unmuted = threading.Event()
unmuted.set()
held_back = {}  # by type: the responses that wait, each with its stream
nonce = 0


def say(**what):
    with lock:
        print(json.dumps(what), flush=True)


def aliases(message):
    """network/address of each address, by which a workload or service may be asked for too."""
    if workload := message.get("workload"):
        pairs = [(workload.get("network", ""), address) for address in workload.get("addresses", [])]
    else:
        pairs = [(one["network"], one["address"]) for one in message.get("service", {}).get("addresses", [])]
    return [f"{network}/{ipaddress.ip_address(base64.b64decode(address))}" for network, address in pairs]


def find(kind, names):
    """What is there of `names`, and which of them lead nowhere."""
    known = {alias: name for name, (_, message) in state[kind].items() for alias in [name, *aliases(message)]}
    return sorted({known[name] for name in names if name in known}), [n for n in names if n not in known]


def resource(kind, name, version, message):
    content = MESSAGES[kind]()
    if "raw" not in message:
        json_format.ParseDict(message, content)
    made = discovery_pb2.Resource(name=name, version=version, aliases=aliases(message))
    made.resource.type_url = URLS[kind]
    made.resource.value = base64.b64decode(message["raw"]) if "raw" in message else content.SerializeToString()
    return made


def response(kind, changed, removed):
    global nonce
    nonce += 1
    resources = [resource(kind, name, *state[kind][name]) for name in changed]
    return discovery_pb2.DeltaDiscoveryResponse(
        type_url=URLS[kind], nonce=str(nonce), resources=resources, removed_resources=removed
    )


def put(out, one):
    """Sends a response on a stream, or keeps it while its type is held back."""
    with lock:
        waiting = held_back.get(KINDS[one.type_url])
        (out.put(one) if waiting is None else waiting.append((out, one)))


class Service(discovery_pb2_grpc.AggregatedDiscoveryServiceServicer):
    def DeltaAggregatedResources(self, requests, context):
        say(stream=dict(context.invocation_metadata()))
        out = queue.Queue()
        streams.append(out)
        wanted = {}  # of each type, by name; everything if it is not there

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
                    if "*" in request.resource_names_unsubscribe:
                        wanted[kind] = set()
                    if kind in wanted:
                        names = [name for name in request.resource_names_subscribe if name != "*"]
                        wanted[kind] |= set(names)
                        wanted[kind] -= set(request.resource_names_unsubscribe)
                        if names:
                            unmuted.wait()
                            found, gone = find(kind, names)
                            changed = [n for n in found if held.get(n) != state[kind][n][0]]
                            put(out, response(kind, changed, gone + [n for n in held if n not in state[kind]]))
                    elif not request.response_nonce:
                        changed = [n for n, (version, _) in state[kind].items() if held.get(n) != version]
                        put(out, response(kind, changed, [n for n in held if n not in state[kind]]))
            except grpc.RpcError:
                pass
            except Exception as error:  # the stream went away
                say(note=str(error))
            say(ended=True)
            out.put(None)

        threading.Thread(target=hear, daemon=True).start()
        while (one := out.get()) is not None:
            yield one


certificate_file, key_file, where, root_file, root_key_file = sys.argv[1:6]


class Certificates(ca_pb2_grpc.IstioCertificateServiceServicer):
    """Signs whatever it is asked to, with the identity that the request names."""

    def CreateCertificate(self, request, context):
        identity = json_format.MessageToDict(request.metadata)["ImpersonatedIdentity"]
        say(signed=identity, **{"with": dict(context.invocation_metadata())})
        folder = tempfile.mkdtemp(dir=made)
        extensions = os.path.join(folder, "ext")
        with open(extensions, "w") as file:
            file.write(f"subjectAltName=critical,URI:{identity}\nextendedKeyUsage=serverAuth,clientAuth\n")
        sign = ["openssl", "x509", "-req", "-CA", root_file, "-CAkey", root_key_file, "-days", "1",
                "-set_serial", str(int.from_bytes(os.urandom(8), "big") >> 1), "-extfile", extensions]
        leaf = subprocess.run(sign, input=request.csr.encode(), capture_output=True, check=True).stdout.decode()
        return ca_pb2.IstioCertificateResponse(cert_chain=[leaf, open(root_file).read()])


certificate, key = (open(path, "rb").read() for path in (certificate_file, key_file))
server = grpc.server(futures.ThreadPoolExecutor(max_workers=16))
discovery_pb2_grpc.add_AggregatedDiscoveryServiceServicer_to_server(Service(), server)
ca_pb2_grpc.add_IstioCertificateServiceServicer_to_server(Certificates(), server)
if where.startswith("unix:"):
    port = server.add_insecure_port(where)
else:
    port = server.add_secure_port(where, grpc.ssl_server_credentials([(key, certificate)]))
server.start()
say(listening=port)
for line in sys.stdin:
    command = json.loads(line)
    if "mute" in command:
        (unmuted.clear if command["mute"] else unmuted.set)()
        say(mute=True)
        continue
    if "hold_back" in command:
        held_back[command["hold_back"]] = []
        continue
    if "let_go" in command:
        with lock:
            for out, one in held_back.pop(command["let_go"], []):
                out.put(one)
        continue
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
            put(out, response(kind, list(command.get("set", {})), command.get("remove", [])))
server.stop(None)
