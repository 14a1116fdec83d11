// Clicks on a result or in its full view go to the server by key; closing needs no server.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  if (button.dataset.act === "close") props.value = "";
  else trigger("click", { act: button.dataset.act, key: button.dataset.key });
});
// What has come is brought into view: a result in full always, results where they stand below the form.
watch("value", () => {
  const detail = element.querySelector(".detail");
  if (detail) {
    detail.scrollIntoView({ block: "start" });
    detail.querySelector("button").focus({ preventScroll: true });
  } else if (window.innerWidth < 760 && element.querySelector(".cards")) {
    document.querySelector("#status").scrollIntoView({ block: "start" });
  }
});
