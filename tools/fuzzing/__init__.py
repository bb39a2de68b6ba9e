"""Damaged and hostile files, and a child process that reads them within limits."""
