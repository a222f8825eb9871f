"""A turn of conversation: the agent, its HTTP gateway, chat page, client and command line."""
