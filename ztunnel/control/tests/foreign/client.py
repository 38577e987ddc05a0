"""A tunnel that shares no code with ours: Python's gRPC, and the protobuf definitions of foreign programs.

It subscribes to everything, or to the addresses and services that are named alone, acknowledges what it is sent, and prints after each response what it has by then: one
JSON object a line, {TYPE URL: {NAME: RESOURCE}}. A RESOURCE is protobuf's JSON, with addresses as they are written,
and "aliases". What the definitions do not know is an error.

Arguments: HOST:PORT, the root's file, the name in the server's certificate, the folder of the definitions, names.
The token is on stdin.
"""
import ipaddress, json, os, queue, sys, tempfile

import grpc
from grpc_tools import protoc

address, root, server_name, definitions, *names = sys.argv[1:]
made = tempfile.mkdtemp()
include = os.path.join(os.path.dirname(sys.modules["grpc_tools"].__file__), "_proto")
files = [os.path.join(definitions, f"{name}.proto") for name in ("discovery", "istio", "security")]
arguments = [f"-I{definitions}", f"-I{include}", f"--python_out={made}", f"--grpc_python_out={made}"]
assert protoc.main(["protoc", *arguments, *files]) == 0
sys.path.insert(0, made)
import discovery_pb2, discovery_pb2_grpc, istio_pb2, security_pb2

TYPES = {
    "type.googleapis.com/istio.security.Authorization": security_pb2.Authorization,
    "type.googleapis.com/istio.workload.Address": istio_pb2.Address,
}


def shown(message):
    """As a dictionary, with each field that is not its default."""
    known = type(message)()
    known.CopyFrom(message)
    known.DiscardUnknownFields()
    assert known == message and known.ByteSize() == message.ByteSize(), f"unknown fields in {message}"
    fields = {}
    for field, value in message.ListFields():
        if field.message_type and field.message_type.GetOptions().map_entry:
            fields[field.name] = {key: shown(one) for key, one in value.items()}
        elif field.message_type:
            fields[field.name] = [shown(one) for one in value] if field.is_repeated else shown(value)
        elif field.type == field.TYPE_BYTES:
            text = lambda octets: str(ipaddress.ip_address(octets))
            fields[field.name] = [text(one) for one in value] if field.is_repeated else text(value)
        elif field.enum_type:
            name = lambda number: field.enum_type.values_by_number[number].name
            fields[field.name] = [name(one) for one in value] if field.is_repeated else name(value)
        else:
            fields[field.name] = list(value) if field.is_repeated else value
    return fields


requests = queue.Queue()
# As Istio's tunnel says who it is.
node = discovery_pb2.Node(id="ztunnel~127.0.0.1~ztunnel-x.adit-system~adit-system.svc.cluster.local")
node.metadata.update({"NAME": "ztunnel-x", "NAMESPACE": "adit-system", "INSTANCE_IPS": "127.0.0.1",
                      "CLUSTER_ID": "Kubernetes"})
for url in TYPES:
    some = ["*"] if names and url.endswith("Address") else []
    requests.put(discovery_pb2.DeltaDiscoveryRequest(
        type_url=url, node=node, resource_names_subscribe=some, resource_names_unsubscribe=some))
for name in names:
    requests.put(discovery_pb2.DeltaDiscoveryRequest(type_url=url, resource_names_subscribe=[name]))
credentials = grpc.ssl_channel_credentials(open(root, "rb").read())
options = [("grpc.max_receive_message_length", 1 << 28), ("grpc.ssl_target_name_override", server_name)]
channel = grpc.secure_channel(address, credentials, options)
stub = discovery_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
metadata = [("authorization", f"Bearer {sys.stdin.readline().strip()}")]
has = {url: {} for url in TYPES}
for response in stub.DeltaAggregatedResources(iter(requests.get, None), metadata=metadata):
    held = has[response.type_url]
    for resource in response.resources:
        message = TYPES[response.type_url]()
        assert resource.resource.type_url == response.type_url
        message.ParseFromString(resource.resource.value)
        held[resource.name] = {**shown(message), "aliases": sorted(resource.aliases)}
    for name in response.removed_resources:
        held.pop(name, None)
    requests.put(discovery_pb2.DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce))
    print(json.dumps(has), flush=True)
