"""The front door: HTTP request -> scores -> route -> article -> persona model -> stream -> feedback. Never imports torch."""
