(() => {
  const list = document.getElementById("list"), articles = [...list.children];
  const filter = document.getElementById("filter"), order = document.getElementById("order");
  const texts = new Map(articles.map((each) => [each, each.textContent.normalize("NFC").toLowerCase()]));
  const value = (each, name) => Number(each.dataset[name]);
  const orders = {
    rise: (a, b) => value(b, "change") - value(a, "change"),
    fall: (a, b) => value(a, "change") - value(b, "change"),
    change: (a, b) => Math.abs(value(b, "change")) - Math.abs(value(a, "change")),
    gold: (a, b) => value(a, "gold") - value(b, "gold"),
  };
  const show = () => {
    const words = filter.value.normalize("NFC").toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const each of articles) {
      each.hidden = !words.every((word) => texts.get(each).includes(word));
      if (!each.hidden) shown += 1;
    }
    list.append(...[...articles].sort(orders[order.value]));
    document.getElementById("count").textContent = `${shown} of ${articles.length} shown`;
  };
  filter.addEventListener("input", show);
  order.addEventListener("change", show);
})();
