// READ FIRST.  The page begins here: who looks, what is shown, and what keeps it new.

import { key, read } from "./api.js";
import { CheckpointsPanel } from "./checkpoints.js";
import { say } from "./dom.js";
import { Glance } from "./glance.js";
import { HealthPanel } from "./health.js";
import { Live } from "./live.js";
import { PlaygroundPanel } from "./playground.js";
import { RunsPanel } from "./runs.js";
import { askForKey } from "./sign_in.js";
import { Tabs } from "./tabs.js";
import { themed } from "./theme.js";

const at = (id) => document.getElementById(id);

themed(at("theme"));
const { keys } = await read("api/console");
const live = new Live(denied);
const tabs = new Tabs(document.querySelector("[role=tablist]"), () => live.state && live.soon());
const playground = new PlaygroundPanel(at("playground"));
const tryModel = (model) => {
  playground.choose(model);
  tabs.select("playground");
  at("tab-playground").focus();
};
const runs = new RunsPanel(at("runs"), live, tryModel);
const panels = [
  new Glance(at("glance")),
  runs,
  new CheckpointsPanel(at("checkpoints"), live, tryModel),
  playground,
  new HealthPanel(at("health")),
];

live.on((state, isNew) => {
  const good = !live.problem && state?.service.ready;
  at("connection").dataset.tone = live.problem ? "bad" : good ? "good" : "warn";
  say(at("connection"), live.problem ? "no connection" : good ? "live" : "starting");
  at("connection").title = live.problem;
  if (!state) return;
  delete at("content").dataset.waiting;
  at("who").hidden = at("sign-out").hidden = !keys;
  say(at("who"), state.service.project);
  at("who").title = `project ${state.service.project}, key ${state.service.key}`;
  for (const panel of panels) panel.show(state, isNew);
});
live.onTick((state) => runs.refresh(state));

function denied(message) {
  live.stop();
  const had = key.get();
  key.forget();
  enter(had ? message : "");
}

async function enter(problem = "") {
  if (keys && !key.get()) await askForKey(at("sign-in"), problem);
  live.start();
}

at("sign-out").addEventListener("click", () => {
  key.forget();
  location.reload(); // nothing of what was shown stays in memory
});
tabs.fromAddress();
await enter();
