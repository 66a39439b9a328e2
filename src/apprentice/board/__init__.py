"""The board: one local web page over the runs of a storage, and its JSON API.

    server.py        the FastAPI application and the process that serves it
    access.py        key, Host, Origin and read-only: the middleware around all routes
    confirmation.py  a change names what happens and waits for a yes
    run_list.py      the rows of the page Runs; run_notes.py keeps tags and archive in the run folder
    metric_series.py steps.jsonl as columns, smoothed and downsampled; record_feed.py sends its new records to all clients
    routes/          the API, one file a page
    static/          the pages, one ES module each

To add a page:

1. `routes/NAME_routes.py` with `add_NAME_routes(app, board)`, called in `server.board_app`. A route that changes something takes
   the request and calls `confirm(request, sentence)` first; `board.storage` is the storage. Read-only is refused by the middleware.
2. `static/NAME.js`, which exports `async function render(container, api, path)`: it fills `container`, may return a function that
   ends what it began, and asks by `api.get(path)` and `api.change(method, path, body)`; the latter shows the sentence of
   `confirm` and sends the request again after a yes. `path` holds the parts of the address behind the page's name (`#/NAME/…`).
3. A line in `PAGES` of `static/app.js`: name, title, module.
"""
