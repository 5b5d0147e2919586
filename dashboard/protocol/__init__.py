"""Protocol `offloop.v1`: the messages between a viewer and the server. Types and bytes; no socket.

A viewer opens a websocket at `ws`, relative to the page, with the subprotocol `offloop.v1`. Then:

    viewer                                   server
    ──────                                   ──────
    hi ────────────────────────────────────>
        <──────────────────────────────────── hello     the server, your role, the list of runs
        <──────────────────────────────────── run       fixed facts about the run you watch
        <──────────────────────────────────── status    current state; again after a change
        <──────────────────────────────────── series    names of its curves; later: new ones
        <──────────────────────────────────── milestone all since `hi.after`, then as they happen
    show ──── curves and width ────────────>
        <════════════════════════════════════ snapshot  these curves so far, in columns
    drawn ─────────────────────────────────>            credit for the next chart frame
        <════════════════════════════════════ delta     new points, at most ten times a second
    drawn ─────────────────────────────────>
    sample ── one of those in the index ───>
        <════════════════════════════════════ sample    a text, a picture or a table
    drawn ─────────────────────────────────>
    command ───────────────────────────────>
        <──────────────────────────────────── ack       accepted, then applied, rejected or expired

There are two lanes. Text frames (──, JSON, one message per frame, its kind in `type`) need no credit: a hidden page
learns at once that its run has failed. Binary frames (══) hold chart points, a sample or layers; one is sent only
after `drawn` has acknowledged the previous one, so a slow page receives fewer and larger frames instead of a queue. No
point is sent twice or lost in between, because a chart frame is made from the run's history once there is credit for
it.

A viewer that reconnects says in `hi` up to which milestone it knows the run; curves start again with a snapshot.
A command carries an id chosen by its viewer, so that a repeated request is not applied twice.

JSON cannot express NaN and infinities: they are sent as `"NaN"`, `"Infinity"` and `"-Infinity"`.
"""
