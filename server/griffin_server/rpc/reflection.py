"""Server reflection as grpc.reflection.v1, and as v1alpha for older tools.

The two differ only in the name of their package (github.com/grpc/grpc-proto, grpc/reflection/v1),
and grpcio-reflection has only v1alpha. So v1 is described by v1alpha's descriptor under the other
name, and served by v1alpha's servicer: the bytes on the wire are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf import descriptor_pb2, descriptor_pool, text_format
from grpc_reflection.v1alpha import reflection, reflection_pb2

V1ALPHA, V1 = "grpc.reflection.v1alpha", "grpc.reflection.v1"
SERVICES = tuple(f"{package}.ServerReflection" for package in (V1, V1ALPHA))


def add_reflection(services: Sequence[str], server: grpc.aio.Server) -> None:
    """Lets a server describe its services.

    Args:
        services: the full names of all services but reflection itself.
    """
    _describe_v1()
    servicer: Any = reflection.aio.ReflectionServicer((*services, *SERVICES))
    handler = grpc.stream_stream_rpc_method_handler(
        servicer.ServerReflectionInfo,
        request_deserializer=reflection_pb2.ServerReflectionRequest.FromString,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        tuple(
            grpc.method_handlers_generic_handler(service, {"ServerReflectionInfo": handler})
            for service in SERVICES
        )
    )


def _describe_v1() -> None:
    """Adds v1's file to the descriptor pool that reflection reads. A second call has no effect."""
    file = descriptor_pb2.FileDescriptorProto()
    reflection_pb2.DESCRIPTOR.CopyToProto(file)
    text = text_format.MessageToString(file)
    v1 = text.replace(V1ALPHA, V1).replace("grpc_reflection/v1alpha/", "grpc/reflection/v1/")
    file = text_format.Parse(v1, descriptor_pb2.FileDescriptorProto())
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
