// Checkpoints: found, taken away, published, deleted.

import { read, send } from "./api.js";
import { confirmed } from "./confirm.js";
import { copy, h, head, keyed, note, row, say, set } from "./dom.js";
import { bytes, count, date, short, when } from "./format.js";

const COLUMNS = {
  name: "Checkpoint",
  kind: "Kind",
  step: "Step",
  size: "Size",
  created: "Created",
  expires: "Expires",
  seen: "Seen by",
  do: "Actions",
};

export class CheckpointsPanel {
  constructor(element, live, tryModel) {
    [this.#live, this.#try] = [live, tryModel];
    this.#find = h("input", {
      type: "search",
      id: "find",
      placeholder: "Name, run or path",
      on: { input: () => this.#list() },
    });
    this.#kind = h(
      "select",
      { id: "kind", on: { change: () => this.#list() } },
      ["all", "training", "sampler", "external"].map((kind) => h("option", {}, kind)),
    );
    this.#total = h("span", { class: "muted" });
    this.#body = h("tbody");
    this.#empty = h("p", { class: "empty", hidden: true });
    this.#more = h("button", {
      type: "button",
      hidden: true,
      on: { click: () => live.more("num_checkpoints", 200) },
    });
    this.#table = h(
      "table",
      { class: "wide" },
      head("Checkpoint", "Kind", ">Step", ">Size", "Created", "Expires", "Seen by", "Actions"),
      this.#body,
    );
    element.append(
      h(
        "div",
        { class: "card" },
        h(
          "div",
          { class: "tools" },
          h("h2", {}, "Checkpoints"),
          this.#total,
          h("span", { class: "spring" }),
          h("label", { for: "find" }, "Find"),
          this.#find,
          h("label", { for: "kind" }, "Kind"),
          this.#kind,
        ),
        h("div", { class: "scroll" }, this.#table),
        this.#empty,
        this.#more,
      ),
    );
  }

  #live;
  #try;
  #find;
  #kind;
  #total;
  #body;
  #empty;
  #more;
  #table;
  #state;

  show(state) {
    this.#state = state;
    say(this.#total, `${count(state.num_checkpoints)}, ${bytes(state.num_bytes)}`);
    const left = state.num_checkpoints - state.checkpoints.length;
    this.#more.hidden = left <= 0;
    say(this.#more, `Show more (${count(left)} left)`);
    this.#list();
  }

  #list() {
    if (!this.#state) return;
    const [wanted, kind] = [this.#find.value.trim().toLowerCase(), this.#kind.value];
    const found = this.#state.checkpoints.filter(
      (each) => (kind === "all" || each.kind === kind) && each.path.toLowerCase().includes(wanted),
    );
    keyed(
      this.#body,
      found,
      (each) => each.path,
      (each) => this.#make(each),
      (line, each) => this.#update(line, each),
    );
    this.#table.hidden = !found.length;
    this.#empty.hidden = found.length > 0;
    const none =
      "No checkpoints yet: save_state keeps one to go on from, save_weights_for_sampler one to sample from.";
    say(this.#empty, this.#state.checkpoints.length ? "Nothing matches." : none);
  }

  #make(record) {
    const line = row(
      ["name", "kind", ">step", ">size", "created", "expires", "seen", "do"],
      COLUMNS,
    );
    line.pill = h("span", { class: "pill" });
    line.at.kind.append(line.pill);
    line.of = h("small", { class: "muted", title: record.path });
    line.at.name.append(h("b", {}, record.name), line.of);
    const button = (text, act, more = {}) =>
      h(
        "button",
        {
          type: "button",
          "aria-label": `${text} ${record.name}`,
          ...more,
          on: { click: () => act(line.record) },
        },
        text,
      );
    line.publish = button("Publish", (each) => this.#publish(each), { class: "publish" });
    line.drop = button("Delete", (each) => this.#delete(each), { class: "quiet-danger" });
    line.try = button("Try", (each) => this.#try(each.path));
    line.at.do.append(
      h(
        "div",
        { class: "buttons" },
        line.try,
        button("Copy path", (each) => copy(each.path, "the path")),
        button("Download", (each) => download(each)),
        line.publish,
        line.drop,
      ),
    );
    return line;
  }

  #update(line, record) {
    line.record = record;
    const run = this.#state.runs.find((each) => each.id === record.run);
    say(line.of, run ? `of ${run.label}` : short(record.run, 36));
    say(line.pill, record.kind);
    say(line.at.step, count(record.step));
    say(line.at.size, bytes(record.size_bytes));
    say(line.at.created, when(record.created));
    line.at.created.title = date(record.created);
    say(line.at.expires, record.expires === null ? "never" : when(record.expires));
    if (record.expires !== null) line.at.expires.title = date(record.expires);
    say(line.at.seen, record.public ? "all keys" : "project");
    say(line.publish, record.public ? "Unpublish" : "Publish");
    set(line.publish, "aria-label", `${record.public ? "Unpublish" : "Publish"} ${record.name}`);
    const may = this.#state.service.may;
    line.publish.disabled = line.drop.disabled = !may.includes("train");
    const model = this.#state.models.find((each) => each.name === record.base_model);
    line.try.hidden = record.kind === "training" || !model?.can_sample;
  }

  async #publish(record) {
    if (
      !record.public &&
      !(await confirmed(
        "Publish this checkpoint?",
        "Every key of this service will be able to read it.",
        record.path,
        "Publish",
      ))
    )
      return;
    await this.#change(
      record,
      "/publish",
      record.public ? "DELETE" : "POST",
      record.public ? "It is the project's own again" : "Every key can read it now",
    );
  }

  async #delete(record) {
    const text =
      "Its files are deleted at once. Nobody can go on from it, or sample from it, afterwards.";
    if (!(await confirmed("Delete this checkpoint?", text, record.path, "Delete"))) return;
    await this.#change(record, "", "DELETE", `Deleted ${record.name}`);
  }

  async #change(record, what, method, said) {
    const path = `api/v1/training_runs/${encodeURIComponent(record.run)}/checkpoints/${record.id}${what}`;
    try {
      await send(path, { method });
      note(said, "good");
    } catch (error) {
      note(error.message, "bad");
    }
    this.#live.soon();
  }
}

/** Download a checkpoint's files as one tar: by an address that is good for an hour. */
async function download(record) {
  try {
    const { url } = await read(`api/console/archive?${new URLSearchParams({ path: record.path })}`);
    h("a", { href: url, download: "" }).click();
    note(`Downloading ${record.name} (${bytes(record.size_bytes)})`);
  } catch (error) {
    note(error.message, "bad");
  }
}
