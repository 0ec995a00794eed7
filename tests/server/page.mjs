// Drives the page: loads and pins a model, chats, sees tokens stream, thoughts and calls of tools, clears a tier, downloads a
// model, in both schemes and on a phone.
// Prints a JSON object for each step; pictures go to the folder PICTURES.
import assert from "node:assert/strict";
import puppeteer from "puppeteer-core";

const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox", "--disable-gpu"] });
const page = await browser.newPage();
const faults = [];
page.on("pageerror", error => faults.push(String(error)));
page.on("console", message => message.type() === "error" && faults.push(message.text()));
page.on("request", request => request.url().startsWith(process.env.URL) || faults.push(`it asks ${request.url()}`));
const text = selector => page.$eval(selector, node => node.textContent);
const until = (check, ...rest) => page.waitForFunction(check, { timeout: 30000 }, ...rest);
const say = async words => {
  await page.type("#text", words);
  await page.click("#send");
  await until(() => document.querySelector("#send").textContent === "Send");
};
const picture = name => page.screenshot({ path: `${process.env.PICTURES}/${name}.png` });

const steps = {
  async "it opens"() {
    await page.setViewport({ width: 1200, height: 850 });
    await page.goto(process.env.URL);
    await until(() => document.querySelector("[data-load]"));
    assert.match(await text("#state"), /on cpu/);
  },
  async "a model is loaded"() {
    await page.click("[data-load='tiny-chat']");
    await until(() => document.querySelector("[data-load='tiny-chat']").textContent === "Unload");
  },
  async "a chat streams"() {
    await page.evaluate(() => {
      window.lengths = new Set();
      new MutationObserver(() => window.lengths.add(document.querySelector("#log").textContent.length))
        .observe(document.querySelector("#log"), { childList: true, subtree: true, characterData: true });
    });
    await say("Tell me a short story about a fox.");
    assert.match(await text("#speed"), /tokens\/s/);
    assert.ok(await page.evaluate(() => window.lengths.size) > 5, "it came at once");
    await say("What is 12 plus 30?");
    assert.match(await text("#log > :last-child"), /42/);
    await picture("page-light");
  },
  async "thoughts are shown"() {
    await page.click("#reset");
    await page.click("#think");
    await say("What is 12 plus 30?");
    assert.ok((await text("#log .thought")).length > 0);
    await page.click("#think");
  },
  async "a call of a tool is answered"() {
    await page.click("#reset");
    await page.click("details summary");
    const parameters = { type: "object", properties: { city: { type: "string" } }, required: ["city"] };
    const description = "Get the weather of a city.";
    await page.$eval("#tools", (node, tools) => { node.value = tools; },
      JSON.stringify([{ type: "function", function: { name: "get_weather", description, parameters } }]));
    await say("What is the weather in Oslo?");
    assert.match(await text("#log .call"), /^get_weather\(.*Oslo/);
    assert.equal(await page.$eval("#text", node => node.placeholder), "Result of get_weather");
    await say('{"temperature": 7, "sky": "rainy"}');
    assert.match(await text("#log .turn:last-child"), /rainy/);
  },
  async "all calls of an answer are answered"() {
    await page.click("#reset");
    // The bundled model calls one tool at a time: the first answer is made up here, and what the page sends next is kept.
    const asked = [], path = "/v1/chat/completions";
    const call = index => ({ index, id: `call_${index}`, function: { name: ["first", "second"][index], arguments: "{}" } });
    const chunk = { choices: [{ index: 0, delta: { tool_calls: [call(0), call(1)] }, finish_reason: null }] };
    await page.setRequestInterception(true);
    const intercept = request => {
      if (!request.url().endsWith(path)) return request.continue();
      asked.push(JSON.parse(request.postData()));
      if (asked.length > 1) return request.continue();
      request.respond({ contentType: "text/event-stream", body: `data: ${JSON.stringify(chunk)}\n\ndata: [DONE]\n\n` });
    };
    page.on("request", intercept);
    await say("Call both.");
    await say("one");
    assert.equal(asked.length, 1, "it asked with a result missing");
    assert.equal(await page.$eval("#text", node => node.placeholder), "Result of second");
    await say("two");
    const results = asked[1].messages.filter(message => message.role === "tool");
    assert.deepEqual(results.map(({ tool_call_id, content }) => [tool_call_id, content]), [["call_0", "one"], ["call_1", "two"]]);
    page.off("request", intercept);
    await page.setRequestInterception(false);
    await page.$eval("#tools", node => { node.value = ""; });
  },
  async "a model is pinned"() {
    const pinned = words => until(words => {
      const button = document.querySelector("[data-pin='tiny-chat']");
      return button.textContent === words && !button.disabled;
    }, words);
    await page.click("[data-pin='tiny-chat']");
    await pinned("Unpin");
    // What the server says arrives between press and release, and the click still counts.
    await page.hover("[data-pin='tiny-chat']");
    await page.mouse.down();
    await page.evaluate(async () => {
      while (refreshing) await new Promise(next => setTimeout(next, 10));
      await refresh();
    });
    await page.mouse.up();
    await pinned("Pin");
  },
  async "a tier is cleared"() {
    await page.click("[data-tier='pools']");
    await until(() => /freed/.test(document.querySelector("#cleared").textContent));
    assert.doesNotMatch(await text("#cleared"), /^0 /);
  },
  async "a model is downloaded"() {
    await page.type("#repo", "org/tiny");
    await page.click("#pull button");
    await until(() => {
      const bar = document.querySelector("#downloads progress");
      return bar && 0 < bar.value && bar.value < bar.max;
    });
    await until(() => /done/.test(document.querySelector("#downloads").textContent));
    assert.ok(await page.$eval("#downloads progress", bar => bar.value === bar.max));
    await until(() => document.querySelector("[data-load='org/tiny']"));
    await page.click("#downloads button");
    await until(() => !document.querySelector("#downloads").firstChild);
  },
  async "it is dark where people like that, and fits a phone"() {
    const back = () => page.$eval("body", node => getComputedStyle(node).backgroundColor);
    const light = await back();
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "dark" }]);
    assert.notEqual(await back(), light);
    await picture("page-dark");
    await page.setViewport({ width: 390, height: 844, isMobile: true, deviceScaleFactor: 2 });
    const wider = await page.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    assert.ok(wider <= 0, `it is ${wider} pixels wider than the screen`);
    await picture("page-phone");
  },
  async "nothing went wrong, and nothing was fetched from elsewhere"() {
    assert.deepEqual(faults, []);
  },
};

for (const [name, step] of Object.entries(steps)) {
  const began = performance.now();
  let problem;
  try {
    await step();
  } catch (error) {
    problem = error.stack ?? String(error);
  }
  console.log(JSON.stringify({ name, seconds: (performance.now() - began) / 1000, problem }));
}
await browser.close();
