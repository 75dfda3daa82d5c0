"""Any server that speaks OpenAI's chat API: asked within its limits and a budget, every answer kept in a log."""
