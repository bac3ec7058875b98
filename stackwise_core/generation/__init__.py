"""Text from a rack: next tokens with a key-value cache, masked tokens by repeated unmasking."""
