"""Client of any server with OpenAI's chat API. It respects rate limits and a budget, and logs every answer."""
