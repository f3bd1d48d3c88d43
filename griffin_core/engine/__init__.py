"""The engine: sessions and prefills of one model, in one thread.

The way of a task, by the names to read::

    Engine.submit -> commands.Submit -> dispatch -> Admission.submit -> TurnPlanner.plan
    -> Scheduler.enqueue -> Admission.admit -> SessionMemory.allocate -> SessionPrefills.start
    -> PrefillQueue here, or the PrefillSource elsewhere -> Admission.receive -> HandoffReceiver
    -> TokenSteps.run -> Generation.take -> Sessions.finish -> Sessions.free

A task that scores goes through ``ScoreSteps`` and ``Scoring`` instead. ``EngineLoop.run_turn`` says
in which order these run, ``ExpertGroups`` on which experts.
"""
