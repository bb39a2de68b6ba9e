"""What a person looks at: a page, its curves, the console. No task and no family by name."""
