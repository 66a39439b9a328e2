"""From a rendered example to token ids: prompt formats, the prompt contract, tokenizing."""
