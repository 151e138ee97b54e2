"""The in-browser verifier in a real Chromium, over the DevTools protocol (Playwright)."""
