"""The HTTP side of serving: routes, their fields, texts from tokens, events as they come.

    app = create_app({"policy": Served(engine, policy)}, Settings(api_key="..."))
    run_server(app, "127.0.0.1", 8000)

What samples is behind the seam `Engine`. Needs the extra ``serve``.
"""
