// Send clicks on a result or in the detail view to the server, with the key of the row; closing needs no server.
element.addEventListener("click", (event) => {
  const button = event.target.closest("[data-act]");
  if (!button) return;
  if (button.dataset.act === "close") props.value = "";
  else trigger("click", { act: button.dataset.act, key: button.dataset.key });
});
// Scroll new content into view: the detail view always, results only if they are below the form.
watch("value", () => {
  const detail = element.querySelector(".detail");
  if (detail) {
    detail.scrollIntoView({ block: "start" });
    detail.querySelector("button").focus({ preventScroll: true });
  } else if (window.innerWidth < 760 && element.querySelector(".cards")) {
    document.querySelector("#status").scrollIntoView({ block: "start" });
  }
});
