// Drives the page: loads a model, chats, sees tokens stream, clears a tier, in both schemes and on a phone.
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
    await page.type("#text", "Tell me a short story about a fox.");
    await page.click("#send");
    await until(() => /tokens\/s/.test(document.querySelector("#speed").textContent));
    assert.ok(await page.evaluate(() => window.lengths.size) > 5, "it came at once");
    await page.type("#text", "What is 12 plus 30?");
    await page.click("#send");
    await until(() => document.querySelector("#log").lastChild.textContent.includes("42"));
    await until(() => document.querySelector("#send").textContent === "Send");
    await picture("page-light");
  },
  async "a tier is cleared"() {
    await page.click("[data-tier='pools']");
    await until(() => /freed/.test(document.querySelector("#cleared").textContent));
    assert.doesNotMatch(await text("#cleared"), /^0 /);
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
