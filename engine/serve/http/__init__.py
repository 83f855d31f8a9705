"""The engine over HTTP: OpenAI's Images, A1111's /sdapi/v1, and an interface of our own."""
