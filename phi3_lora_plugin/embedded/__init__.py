"""A tiny pretrained Phi-3 and its chats, so that everything can be tried offline."""
