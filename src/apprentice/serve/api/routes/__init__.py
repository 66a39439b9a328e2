"""HTTP routes by subject: OpenAI's, instructions and tasks, health, and the browser pages."""
