"""Bodies of requests and answers: protobuf, JSON, compression."""
